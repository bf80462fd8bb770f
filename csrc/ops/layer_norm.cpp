#include "kernels/cpu/layer_norm.h"

#include "core/rows.h"
#include "core/tensor.h"

namespace mllama {
namespace {

void check_parameter(const char* op, const char* name, const Tensor& x, const Tensor& parameter) {
    dtype_of(op, name, parameter);
    check_value(x.dim() >= 1, op, ": x must have at least one dimension");
    check_value(parameter.dim() == 1 && parameter.size(0) == last_size(x), op, ": ", name,
                " must be [", last_size(x), "], the last size of x ", Shape{x}, ", got ",
                Shape{parameter});
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                      double eps) {
    const char* op = "layer_norm";
    Dtype dtype = dtype_of(op, "x", x);
    check_parameter(op, "weight", x, weight);
    check_parameter(op, "bias", x, bias);
    bool alike = weight.scalar_type() == x.scalar_type() && bias.scalar_type() == x.scalar_type();
    ScalarType type = alike ? x.scalar_type() : ScalarType::Float;
    Tensor rows = dense(x), w = dense(to_dtype(weight, type)), b = dense(to_dtype(bias, type));
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = 2;
    Tensor y = new_like(x), statistics = new_float(x, sizes);
    kernels::LayerNorm args{.dtype = dtype,
                            .weight_dtype = alike ? dtype : Dtype::f32,
                            .width = last_size(x),
                            .eps = static_cast<float>(eps),
                            .x = rows.const_data_ptr(),
                            .weight = w.const_data_ptr(),
                            .bias = b.const_data_ptr(),
                            .y = y.mutable_data_ptr(),
                            .statistics = mutable_data<float>(statistics)};
    auto kernel = MLLAMA_CALL(layer_norm);
    parallel_for(row_count(x), row_grain(args.width),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return {y, statistics};
}

// The gradients of weight and bias are empty unless asked for: frozen ones need none.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_y, const Tensor& x,
                                                       const Tensor& weight, const Tensor& bias,
                                                       const Tensor& statistics,
                                                       bool parameter_gradients) {
    const char* op = "_layer_norm_backward";
    Dtype dtype = dtype_of(op, "x", x);
    check_parameter(op, "weight", x, weight);
    check_parameter(op, "bias", x, bias);
    check_value(grad_y.sizes() == x.sizes() && grad_y.scalar_type() == x.scalar_type(), op,
                ": grad_y must be as x, in shape and dtype");
    check_value(
        statistics.numel() == 2 * row_count(x) && statistics.scalar_type() == ScalarType::Float, op,
        ": statistics must be float32 with two values a row");
    bool alike = weight.scalar_type() == x.scalar_type();
    Tensor rows = dense(x), g = dense(grad_y), s = dense(statistics);
    Tensor w = dense(alike ? weight : to_dtype(weight, ScalarType::Float)), grad_x = new_like(x);
    kernels::LayerNormBackward args{.dtype = dtype,
                                    .weight_dtype = alike ? dtype : Dtype::f32,
                                    .width = last_size(x),
                                    .grad_y = g.const_data_ptr(),
                                    .x = rows.const_data_ptr(),
                                    .weight = w.const_data_ptr(),
                                    .statistics = data<float>(s),
                                    .grad_x = grad_x.mutable_data_ptr()};
    auto kernel = MLLAMA_CALL(layer_norm_backward);
    if (!parameter_gradients) {
        parallel_for(row_count(x), row_grain(args.width), [&](int64_t begin, int64_t end) {
            kernel(args, begin, end, nullptr, nullptr);
        });
        return {grad_x, new_tensor(weight, {0}), new_tensor(bias, {0})};
    }
    auto [grad_weight, grad_bias] = sums_over_rows<2>(
        x, row_count(x), args.width,
        [&](int64_t begin, int64_t end, auto sums) { kernel(args, begin, end, sums[0], sums[1]); });
    return {grad_x, to_dtype(grad_weight, weight.scalar_type()),
            to_dtype(grad_bias, bias.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    m.def(
        "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor "
        "statistics)");
    m.def(
        "_layer_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor "
        "statistics, "
        "bool parameter_gradients) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    m.impl("layer_norm", TORCH_BOX(&layer_norm));
    m.impl("_layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace mllama
