// lora_linear: schemas, checks and tensors, shared by all devices.
#pragma once

#include "core/rows.h"

namespace mllama {

constexpr char kLoraLinearSchema[] =
    "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, "
    "Tensor? seed, float scale, float dropout) -> (Tensor y, Tensor small)";
constexpr char kLoraLinearBackwardSchema[] =
    "_lora_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
    "Tensor? bias, Tensor small, Tensor? seed, float scale, float dropout, bool x_gradient, "
    "bool a_gradient, bool b_gradient, bool bias_gradient) "
    "-> (Tensor grad_x, Tensor grad_a, Tensor grad_b, Tensor grad_bias)";

inline Tensor as_rows(const Tensor& t) { return as_matrix(dense(t), row_count(t), last_size(t)); }

struct LoraLinearArgs {
    LoraLinearArgs(const char* op, const Tensor& x_, const Tensor& weight_, const Tensor& a_,
                   const Tensor& b_, const MaybeTensor& bias_, const MaybeTensor& seed_,
                   double scale, double dropout)
        : dtype(checked(op, x_, weight_, a_, b_)),
          a_dtype(dtype_of(op, "lora_a", a_)),
          b_dtype(dtype_of(op, "lora_b", b_)),
          x(as_rows(x_)),
          weight(to_dtype(weight_, x_.scalar_type())),
          a(dense(a_)),
          b(dense(b_)),
          scale(scale),
          dropout(dropout),
          out(weight_.size(0)),
          rank(a_.size(0)) {
        check(0 <= dropout && dropout < 1, op, "dropout");
        check(dropout == 0 ||
                  (seed_ && seed_->numel() == 1 && seed_->scalar_type() == ScalarType::Long),
              op, "seed");
        if (dropout > 0) seed = seed_;
        if (!bias_) return;
        dtype_of(op, "bias", *bias_);
        check(bias_->dim() == 1 && bias_->size(0) == out, op, "bias");
        bias = to_dtype(*bias_, x_.scalar_type());
    }

    Dtype dtype, a_dtype, b_dtype;
    Tensor x;          // [rows, in]
    Tensor weight;     // [out, in], in x's dtype
    Tensor a, b;       // [rank, in] and [out, rank]
    MaybeTensor bias;  // [out], in x's dtype
    MaybeTensor seed;  // int64 [1], with dropout
    double scale, dropout;
    int64_t out, rank;

  private:
    static Dtype checked(const char* op, const Tensor& x, const Tensor& weight, const Tensor& a,
                         const Tensor& b) {
        dtype_of(op, "weight", weight);
        check(x.dim() >= 1, op, "x");
        check(weight.dim() == 2 && weight.size(1) == last_size(x), op, "weight");
        check(a.dim() == 2 && a.size(0) > 0 && a.size(1) == last_size(x), op, "lora_a");
        check(b.dim() == 2 && b.size(0) == weight.size(0) && b.size(1) == a.size(0), op, "lora_b");
        return dtype_of(op, "x", x);
    }
};

}  // namespace mllama
