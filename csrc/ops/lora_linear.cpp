#include "ops/lora_linear.h"

#include "core/threads.h"
#include "ops/unpack_cpu.h"

namespace mllama {
namespace {

struct Cpu {
    using Unpack = UnpackOnCpu;

    static void down(const LowRankProduct& product) {
        auto kernel = MLLAMA_CALL(low_rank_down);
        kernels::LowRank args = with_seed(product);
        parallel_for(blocks_of(args.rows, kernels::kRowBlock), 1,
                     [&](int64_t first, int64_t last) { kernel(args, first, last); });
    }
    static void up(const LowRankProduct& product) {
        auto kernel = MLLAMA_CALL(low_rank_up);
        kernels::LowRank args = with_seed(product);
        parallel_for(
            blocks_of(args.width, kernels::kUpColumns) * blocks_of(args.rows, kernels::kRowBlock),
            row_grain(kernels::kUpColumns * args.rank),
            [&](int64_t first, int64_t last) { kernel(args, first, last); });
    }
    static void outer(const LowRankProduct& product) {
        auto kernel = MLLAMA_CALL(low_rank_outer);
        kernels::LowRank args = with_seed(product);
        parallel_for(blocks_of(args.width, kernels::kOuterColumns),
                     row_grain(kernels::kOuterColumns * args.rows),
                     [&](int64_t first, int64_t last) { kernel(args, first, last); });
    }

  private:
    static int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }
    static kernels::LowRank with_seed(const LowRankProduct& product) {
        kernels::LowRank args = product.args;
        if (product.seed) args.seed = *data<int64_t>(*product.seed);
        return args;
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    define(m, kLoraLinearSchema);
    define(m, kLoraLinearBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "lora_linear", TORCH_BOX(&LoraLinear<Cpu>::forward));
    implement(m, "_lora_linear_backward", TORCH_BOX(&LoraLinear<Cpu>::backward));
}

}  // namespace mllama
