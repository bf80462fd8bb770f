#include "core/launcher.h"
#include "kernels/cuda/cross_entropy.h"
#include "ops/cross_entropy.h"

namespace mllama {
namespace {

Tensor cross_entropy(const Tensor& scores, const Tensor& targets, double softcap, double gradient) {
    CrossEntropyArgs a(scores, targets, softcap, gradient);
    Launcher launcher(a.kOp, a.scores);
    gradient == 0 ? launcher.reads("scores", a.scores) : launcher.updates("scores", a.scores);
    launcher.reads("targets", a.targets);
    launcher.writes("losses", a.losses);
    cuda::cross_entropy(a.kernel(), targets.size(0), launcher.stream());
    launcher.done();
    return a.losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) {
    implement(m, "_cross_entropy", TORCH_BOX(&cross_entropy));
}

}  // namespace mllama
