#include "kernels/cpu/rope.h"

#include "core/rows.h"
#include "core/tensor.h"

namespace mllama {
namespace {

constexpr const char* kOp = "rope";

void check_heads(const char* name, const Tensor& x) {
    check_value(x.dim() == 4, kOp, ": ", name, " must be [B, T, heads, D], got ", Shape{x});
}

void check_table(const char* name, const Tensor& table, const Tensor& q) {
    check_value(table.scalar_type() == ScalarType::Float, kOp, ": ", name, " must be float32");
    check_value(table.dim() == 3 && (table.size(0) == 1 || table.size(0) == q.size(0)) &&
                    table.size(1) == q.size(1) && table.size(2) == q.size(3) / 2,
                kOp, ": ", name, " must be [", q.size(0), " or 1, ", q.size(1), ", ", q.size(3) / 2,
                "], got ", Shape{table});
}

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
    check_heads("q", q);
    check_heads("k", k);
    int64_t batch = q.size(0), tokens = q.size(1), size = q.size(3);
    check_value(size % 2 == 0, kOp, ": head size must be even, got ", size);
    check_value(k.size(0) == batch && k.size(1) == tokens && k.size(3) == size &&
                    k.scalar_type() == q.scalar_type(),
                kOp, ": k must be [", batch, ", ", tokens, ", heads, ", size, "] of ",
                dtype_name(q.scalar_type()), ", got ", Kind{k});
    check_table("cos", cos, q);
    check_table("sin", sin, q);
    Tensor from_q = last_dense(q), from_k = last_dense(k), c = dense(cos), s = dense(sin);
    Tensor to_q = new_like(q), to_k = new_like(k);
    kernels::Rope args{.dtype = dtype_of(kOp, "q", q),
                       .tokens = tokens,
                       .half = size / 2,
                       .sign = inverse ? -1.0f : 1.0f,
                       .q = heads_of(from_q, to_q),
                       .k = heads_of(from_k, to_k),
                       .cos = data<float>(c),
                       .sin = data<float>(s),
                       .cos_batch_stride = c.size(0) == 1 ? 0 : tokens * size / 2,
                       .sin_batch_stride = s.size(0) == 1 ? 0 : tokens * size / 2};
    auto kernel = MLLAMA_CALL(rope);
    parallel_for(batch * tokens, row_grain((q.size(2) + k.size(2)) * size),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return {to_q, to_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor q, Tensor k)");
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) { m.impl("rope", TORCH_BOX(&rope)); }

}  // namespace mllama
