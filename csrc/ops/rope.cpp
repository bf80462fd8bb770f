#include "ops/rope.h"

#include "core/threads.h"
#include "kernels/cpu/rope.h"

namespace mllama {
namespace {

kernels::RopeHeads heads_of(const Tensor& x, const Tensor& y) {
    return {.x = x.const_data_ptr(),
            .y = y.mutable_data_ptr(),
            .heads = x.size(2),
            .batch_stride = x.stride(0),
            .token_stride = x.stride(1),
            .head_stride = x.stride(2)};
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos,
                                const Tensor& sin, bool inverse) {
    RopeArgs a("rope", q, k, cos, sin);
    int64_t batch = q.size(0), tokens = q.size(1), size = q.size(3);
    kernels::Rope args{.dtype = a.dtype,
                       .tokens = tokens,
                       .half = size / 2,
                       .sign = inverse ? -1.0f : 1.0f,
                       .q = heads_of(a.q, a.rotated_q),
                       .k = heads_of(a.k, a.rotated_k),
                       .cos = data<float>(a.cos),
                       .sin = data<float>(a.sin),
                       .cos_batch_stride = cos.size(0) == 1 ? 0 : tokens * size / 2,
                       .sin_batch_stride = sin.size(0) == 1 ? 0 : tokens * size / 2};
    auto kernel = MLLAMA_CALL(rope);
    parallel_for(batch * tokens, row_grain((q.size(2) + k.size(2)) * size),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return {a.rotated_q, a.rotated_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) { define(m, kRopeSchema); }

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) { implement(m, "rope", TORCH_BOX(&rope)); }

}  // namespace mllama
