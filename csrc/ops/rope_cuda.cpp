#include "core/launcher.h"
#include "kernels/cuda/rope.h"
#include "ops/rope.h"

namespace mllama {
namespace {

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos,
                                const Tensor& sin, bool inverse) {
    RopeArgs a("rope", q, k, cos, sin);
    Launcher launcher("rope", a.q);
    launcher.reads("q", a.q);
    launcher.reads("k", a.k);
    launcher.reads("cos", a.cos);
    launcher.reads("sin", a.sin);
    launcher.writes("rotated q", a.rotated_q);
    launcher.writes("rotated k", a.rotated_k);
    cuda::rope(a.kernel(inverse), q.size(0), launcher.stream());
    launcher.done();
    return {a.rotated_q, a.rotated_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) { implement(m, "rope", TORCH_BOX(&rope)); }

}  // namespace mllama
