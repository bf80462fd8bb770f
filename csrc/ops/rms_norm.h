// rms_norm and add_rms_norm: schemas, checks and tensors, shared by all devices.
#pragma once

#include "core/rows.h"
#include "kernels/cpu/rms_norm.h"

namespace mllama {

constexpr char kRmsNormSchema[] =
    "rms_norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor y, Tensor rstd)";
constexpr char kAddRmsNormSchema[] =
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset) "
    "-> (Tensor y, Tensor hidden, Tensor rstd)";
constexpr char kRmsNormBackwardSchema[] =
    "_rms_norm_backward(Tensor grad_y, Tensor? grad_hidden, Tensor hidden, Tensor weight, "
    "Tensor rstd, float offset, bool weight_gradient) -> (Tensor grad_hidden, Tensor grad_weight)";

// The weight, contiguous, in a dtype that kernels accept with x: x's own, or float32.
inline Tensor norm_weight(const char* op, const Tensor& x, const Tensor& weight) {
    dtype_of(op, "weight", weight);
    check(x.dim() >= 1, op, "x");
    check(weight.dim() == 1 && weight.size(0) == last_size(x), op, "weight");
    bool same = weight.scalar_type() == x.scalar_type();
    return dense(same ? weight : to_dtype(weight, ScalarType::Float));
}

struct RmsNormArgs {
    RmsNormArgs(const char* op, const Tensor& x_, const MaybeTensor& residual_,
                const Tensor& weight_, double eps, double offset)
        : dtype(dtype_of(op, "x", x_)),
          weight(norm_weight(op, x_, weight_)),
          weight_dtype(dtype_of(op, "weight", weight)),
          x(dense(x_)),
          eps(static_cast<float>(eps)),
          offset(static_cast<float>(offset)),
          y(new_like(x)),
          hidden(x),
          rstd(new_float(x, Sizes(x.sizes().data(), x.dim() - 1))) {
        if (!residual_) return;
        check(same_kind(*residual_, x), op, "residual");
        residual = dense(*residual_);
        hidden = new_like(x);
    }
    kernels::RmsNorm kernel() const {
        return {.dtype = dtype,
                .weight_dtype = weight_dtype,
                .width = last_size(x),
                .eps = eps,
                .offset = offset,
                .x = x.const_data_ptr(),
                .residual = residual ? residual->const_data_ptr() : nullptr,
                .weight = weight.const_data_ptr(),
                .hidden = residual ? hidden.mutable_data_ptr() : nullptr,
                .y = y.mutable_data_ptr(),
                .rstd = mutable_data<float>(rstd)};
    }

    Dtype dtype;
    Tensor weight;
    Dtype weight_dtype;
    Tensor x;              // [..., D]
    MaybeTensor residual;  // as x
    float eps, offset;
    Tensor y, hidden;  // as x; hidden is x without a residual
    Tensor rstd;       // float32 [...]
};

struct RmsNormBackwardArgs {
    RmsNormBackwardArgs(const char* op, const Tensor& grad_y_, const MaybeTensor& grad_hidden_,
                        const Tensor& hidden_, const Tensor& weight_, const Tensor& rstd_,
                        double offset)
        : dtype(dtype_of(op, "hidden", hidden_)),
          weight(norm_weight(op, hidden_, weight_)),
          weight_dtype(dtype_of(op, "weight", weight)),
          hidden(dense(hidden_)),
          grad_y(dense(grad_y_)),
          rstd(dense(rstd_)),
          offset(static_cast<float>(offset)),
          grad_x(new_like(hidden)) {
        check(same_kind(grad_y, hidden), op, "grad_y");
        check(rstd.numel() == row_count(hidden) && rstd.scalar_type() == ScalarType::Float, op,
              "rstd");
        if (!grad_hidden_) return;
        check(same_kind(*grad_hidden_, hidden), op, "grad_hidden");
        grad_hidden = dense(*grad_hidden_);
    }
    kernels::RmsNormBackward kernel() const {
        return {.dtype = dtype,
                .weight_dtype = weight_dtype,
                .width = last_size(hidden),
                .offset = offset,
                .grad_y = grad_y.const_data_ptr(),
                .grad_hidden = grad_hidden ? grad_hidden->const_data_ptr() : nullptr,
                .x = hidden.const_data_ptr(),
                .weight = weight.const_data_ptr(),
                .rstd = data<float>(rstd),
                .grad_x = grad_x.mutable_data_ptr()};
    }

    Dtype dtype;
    Tensor weight;
    Dtype weight_dtype;
    Tensor hidden;            // [..., D]: what was normalized
    Tensor grad_y;            // as hidden
    MaybeTensor grad_hidden;  // as hidden: the gradient of add_rms_norm's second result
    Tensor rstd;              // float32 [...]
    float offset;
    Tensor grad_x;  // as hidden
};

}  // namespace mllama
