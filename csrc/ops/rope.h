// rope: schema, checks and tensors, shared by all devices.
#pragma once

#include "core/tensor.h"
#include "kernels/cpu/rope.h"

namespace mllama {

constexpr char kRopeSchema[] =
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor q, Tensor k)";

struct RopeArgs {
    RopeArgs(const char* op, const Tensor& q_, const Tensor& k_, const Tensor& cos_,
             const Tensor& sin_)
        : dtype(checked(op, q_, k_, cos_, sin_)),
          q(last_dense(q_)),
          k(last_dense(k_)),
          cos(dense(cos_)),
          sin(dense(sin_)),
          rotated_q(new_like(q)),
          rotated_k(new_like(k)) {}
    kernels::Rope kernel(bool inverse) const {
        int64_t tokens = q.size(1), half = q.size(3) / 2;
        return {.dtype = dtype,
                .tokens = tokens,
                .half = half,
                .sign = inverse ? -1.0f : 1.0f,
                .q = heads_of(q, rotated_q),
                .k = heads_of(k, rotated_k),
                .cos = data<float>(cos),
                .sin = data<float>(sin),
                .cos_batch_stride = cos.size(0) == 1 ? 0 : tokens * half,
                .sin_batch_stride = sin.size(0) == 1 ? 0 : tokens * half};
    }

    Dtype dtype;
    Tensor q;         // [B, T, H, D], any strides but the last one
    Tensor k;         // [B, T, KV, D]
    Tensor cos, sin;  // float32 [B or 1, T, D / 2]
    Tensor rotated_q, rotated_k;

  private:
    static Dtype checked(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos,
                         const Tensor& sin) {
        check(q.dim() == 4 && q.size(3) % 2 == 0, op, "q");
        check(k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) == q.size(1) &&
                  k.size(3) == q.size(3) && k.scalar_type() == q.scalar_type(),
              op, "k");
        check_table(op, "cos", cos, q);
        check_table(op, "sin", sin, q);
        return dtype_of(op, "q", q);
    }
    static kernels::RopeHeads heads_of(const Tensor& x, const Tensor& y) {
        return {.x = x.const_data_ptr(),
                .y = y.mutable_data_ptr(),
                .heads = x.size(2),
                .batch_stride = x.stride(0),
                .token_stride = x.stride(1),
                .head_stride = x.stride(2)};
    }
    static void check_table(const char* op, const char* name, const Tensor& t, const Tensor& q) {
        check(t.scalar_type() == ScalarType::Float && t.dim() == 3 &&
                  (t.size(0) == 1 || t.size(0) == q.size(0)) && t.size(1) == q.size(1) &&
                  t.size(2) == q.size(3) / 2,
              op, name);
    }
};

}  // namespace mllama
