// layer_norm: schemas, checks and tensors, shared by all devices.
#pragma once

#include "core/rows.h"
#include "kernels/cpu/layer_norm.h"

namespace mllama {

constexpr char kLayerNormSchema[] =
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor statistics)";
constexpr char kLayerNormBackwardSchema[] =
    "_layer_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor statistics, "
    "bool parameter_gradients) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)";

// x, weight and bias, contiguous; the parameters both in x's dtype or both in float32.
struct LayerNormInputs {
    LayerNormInputs(const char* op, const Tensor& x_, const Tensor& weight_, const Tensor& bias_)
        : dtype(dtype_of(op, "x", x_)),
          weight_type(common_type(op, x_, weight_, bias_)),
          x(dense(x_)),
          weight(dense(to_dtype(weight_, weight_type))),
          bias(dense(to_dtype(bias_, weight_type))) {}
    Dtype weight_dtype() const { return dtype_of("layer_norm", "weight", weight); }

    Dtype dtype;
    ScalarType weight_type;
    Tensor x;             // [..., D]
    Tensor weight, bias;  // [D]

  private:
    static ScalarType common_type(const char* op, const Tensor& x, const Tensor& weight,
                                  const Tensor& bias) {
        check_parameter(op, "weight", x, weight);
        check_parameter(op, "bias", x, bias);
        bool same =
            weight.scalar_type() == x.scalar_type() && bias.scalar_type() == x.scalar_type();
        return same ? x.scalar_type() : ScalarType::Float;
    }
    static void check_parameter(const char* op, const char* name, const Tensor& x,
                                const Tensor& parameter) {
        dtype_of(op, name, parameter);
        check(x.dim() >= 1, op, "x");
        check(parameter.dim() == 1 && parameter.size(0) == last_size(x), op, name);
    }
};

struct LayerNormArgs : LayerNormInputs {
    LayerNormArgs(const char* op, const Tensor& x_, const Tensor& weight_, const Tensor& bias_,
                  double eps)
        : LayerNormInputs(op, x_, weight_, bias_),
          eps(static_cast<float>(eps)),
          y(new_like(x)),
          statistics(new_float(x, with_last(x, 2))) {}
    kernels::LayerNorm kernel() const {
        return {.dtype = dtype,
                .weight_dtype = weight_dtype(),
                .width = last_size(x),
                .eps = eps,
                .x = x.const_data_ptr(),
                .weight = weight.const_data_ptr(),
                .bias = bias.const_data_ptr(),
                .y = y.mutable_data_ptr(),
                .statistics = mutable_data<float>(statistics)};
    }

    float eps;
    Tensor y;           // as x
    Tensor statistics;  // float32 [..., 2]: mean and 1 / sqrt(variance + eps)
};

struct LayerNormBackwardArgs : LayerNormInputs {
    LayerNormBackwardArgs(const char* op, const Tensor& grad_y_, const Tensor& x_,
                          const Tensor& weight_, const Tensor& bias_, const Tensor& statistics_)
        : LayerNormInputs(op, x_, weight_, bias_),
          grad_y(dense(grad_y_)),
          statistics(dense(statistics_)),
          grad_x(new_like(x)) {
        check(same_kind(grad_y, x), op, "grad_y");
        check(
            statistics.numel() == 2 * row_count(x) && statistics.scalar_type() == ScalarType::Float,
            op, "statistics");
    }
    kernels::LayerNormBackward kernel() const {
        return {.dtype = dtype,
                .weight_dtype = weight_dtype(),
                .width = last_size(x),
                .grad_y = grad_y.const_data_ptr(),
                .x = x.const_data_ptr(),
                .weight = weight.const_data_ptr(),
                .statistics = data<float>(statistics),
                .grad_x = grad_x.mutable_data_ptr()};
    }

    Tensor grad_y;      // as x
    Tensor statistics;  // as LayerNormArgs'
    Tensor grad_x;      // as x
};

}  // namespace mllama
