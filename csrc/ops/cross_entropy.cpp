#include "ops/cross_entropy.h"

#include "core/threads.h"

namespace mllama {
namespace {

Tensor cross_entropy(const Tensor& scores, const Tensor& targets, double softcap, double gradient) {
    CrossEntropyArgs a(scores, targets, softcap, gradient);
    kernels::CrossEntropy args = a.kernel();
    auto kernel = MLLAMA_CALL(cross_entropy);
    parallel_for(targets.size(0), row_grain(args.size),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return a.losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) { define(m, kCrossEntropySchema); }

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "_cross_entropy", TORCH_BOX(&cross_entropy));
}

}  // namespace mllama
