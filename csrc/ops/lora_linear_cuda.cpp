#include "core/launcher.h"
#include "kernels/cuda/lora_linear.h"
#include "ops/lora_linear.h"
#include "ops/unpack_cuda.h"

namespace mllama {
namespace {

class Cuda {
  public:
    using Unpack = UnpackOnCuda;

    static void down(const LowRankProduct& p) {
        Launcher launcher(kOp, p.x);
        launcher.reads("x", p.x);
        launcher.reads("factor", p.factor);
        // other factors have the other columns
        p.args.rank == p.args.stride ? launcher.writes("small", p.small)
                                     : launcher.scratch("small", p.small);
        cuda::low_rank_down(p.args, seed_of(p, launcher), launcher.stream());
        launcher.done();
    }
    static void up(const LowRankProduct& p) {
        Launcher launcher(kOp, p.x);
        launcher.updates("y", p.x);
        launcher.reads("factor", p.factor);
        launcher.reads("small", p.small);
        cuda::low_rank_up(p.args, seed_of(p, launcher), launcher.stream());
        launcher.done();
    }
    static void outer(const LowRankProduct& p) {
        Launcher launcher(kOp, p.x);
        launcher.reads("x", p.x);
        launcher.writes("factor", p.factor);
        launcher.reads("small", p.small);
        cuda::low_rank_outer(p.args, seed_of(p, launcher), launcher.stream());
        launcher.done();
    }

  private:
    static constexpr char kOp[] = "lora_linear";

    // It stays where it is: reading it would wait for the device.
    static const int64_t* seed_of(const LowRankProduct& p, Launcher& launcher) {
        if (!p.seed) return nullptr;
        launcher.reads("seed", *p.seed);
        return data<int64_t>(*p.seed);
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) {
    implement(m, "lora_linear", TORCH_BOX(&LoraLinear<Cuda>::forward));
    implement(m, "_lora_linear_backward", TORCH_BOX(&LoraLinear<Cuda>::backward));
}

}  // namespace mllama
