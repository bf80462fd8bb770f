#include "ops/rope.h"

#include "core/threads.h"

namespace mllama {
namespace {

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos,
                                const Tensor& sin, bool inverse) {
    RopeArgs a("rope", q, k, cos, sin);
    kernels::Rope args = a.kernel(inverse);
    auto kernel = MLLAMA_CALL(rope);
    parallel_for(q.size(0) * q.size(1), row_grain((q.size(2) + k.size(2)) * q.size(3)),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return {a.rotated_q, a.rotated_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) { define(m, kRopeSchema); }

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) { implement(m, "rope", TORCH_BOX(&rope)); }

}  // namespace mllama
