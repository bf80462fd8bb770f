#include "kernels/cpu/rms_norm.h"

#include "core/rows.h"
#include "core/tensor.h"

namespace mllama {
namespace {

// The weight in a dtype the kernel reads beside x: x's own, or f32.
Tensor weight_for(const char* op, const Tensor& x, const Tensor& weight) {
    dtype_of(op, "weight", weight);
    check_value(x.dim() >= 1, op, ": x must have at least one dimension");
    check_value(weight.dim() == 1 && weight.size(0) == last_size(x), op, ": weight must be [",
                last_size(x), "], the last size of x ", Shape{x}, ", got ", Shape{weight});
    return dense(weight.scalar_type() == x.scalar_type() ? weight
                                                         : to_dtype(weight, ScalarType::Float));
}

std::vector<int64_t> statistic_sizes(const Tensor& x) {
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.pop_back();
    return sizes;
}

std::tuple<Tensor, Tensor, Tensor> forward(const char* op, const Tensor& x,
                                           const std::optional<Tensor>& residual,
                                           const Tensor& weight, double eps, double offset) {
    Dtype dtype = dtype_of(op, "x", x);
    Tensor w = weight_for(op, x, weight), rows = dense(x),
           beside = residual ? dense(*residual) : rows;
    Tensor y = new_like(rows), hidden = residual ? new_like(rows) : rows,
           rstd = new_float(x, statistic_sizes(x));
    kernels::RmsNorm args{.dtype = dtype,
                          .weight_dtype = dtype_of(op, "weight", w),
                          .width = last_size(x),
                          .eps = static_cast<float>(eps),
                          .offset = static_cast<float>(offset),
                          .x = rows.const_data_ptr(),
                          .residual = residual ? beside.const_data_ptr() : nullptr,
                          .weight = w.const_data_ptr(),
                          .hidden = residual ? hidden.mutable_data_ptr() : nullptr,
                          .y = y.mutable_data_ptr(),
                          .rstd = mutable_data<float>(rstd)};
    auto kernel = MLLAMA_CALL(rms_norm);
    parallel_for(row_count(x), row_grain(args.width),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return {y, hidden, rstd};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                    double offset) {
    auto [y, hidden, rstd] = forward("rms_norm", x, std::nullopt, weight, eps, offset);
    return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                                const Tensor& weight, double eps, double offset) {
    check_value(x.sizes() == residual.sizes() && x.scalar_type() == residual.scalar_type(),
                "add_rms_norm: residual must be as x, ", Kind{x}, ", got ", Kind{residual});
    return forward("add_rms_norm", x, residual, weight, eps, offset);
}

// `hidden` is what was normalised; grad_hidden is the gradient that reaches it beside the norm
// (add_rms_norm's second result). The weight's gradient is empty unless asked for: frozen weights
// need none.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y,
                                             const std::optional<Tensor>& grad_hidden,
                                             const Tensor& hidden, const Tensor& weight,
                                             const Tensor& rstd, double offset,
                                             bool weight_gradient) {
    const char* op = "_rms_norm_backward";
    Dtype dtype = dtype_of(op, "hidden", hidden);
    check_value(grad_y.sizes() == hidden.sizes() && grad_y.scalar_type() == hidden.scalar_type() &&
                    (!grad_hidden || (grad_hidden->sizes() == hidden.sizes() &&
                                      grad_hidden->scalar_type() == hidden.scalar_type())),
                op, ": gradients must have the shape and dtype of what was normalised");
    check_value(rstd.numel() == row_count(hidden) && rstd.scalar_type() == ScalarType::Float, op,
                ": rstd must be float32 with one value a row");
    Tensor w = weight_for(op, hidden, weight), x = dense(hidden), g = dense(grad_y),
           statistic = dense(rstd);
    std::optional<Tensor> beside;
    if (grad_hidden) beside = dense(*grad_hidden);
    Tensor grad_x = new_like(x);
    kernels::RmsNormBackward args{.dtype = dtype,
                                  .weight_dtype = dtype_of(op, "weight", w),
                                  .width = last_size(x),
                                  .offset = static_cast<float>(offset),
                                  .grad_y = g.const_data_ptr(),
                                  .grad_hidden = beside ? beside->const_data_ptr() : nullptr,
                                  .x = x.const_data_ptr(),
                                  .weight = w.const_data_ptr(),
                                  .rstd = data<float>(statistic),
                                  .grad_x = grad_x.mutable_data_ptr()};
    auto kernel = MLLAMA_CALL(rms_norm_backward);
    int64_t rows = row_count(x);
    if (!weight_gradient) {
        parallel_for(rows, row_grain(args.width),
                     [&](int64_t begin, int64_t end) { kernel(args, begin, end, nullptr); });
        return {grad_x, new_tensor(weight, {0})};
    }
    auto [grad_weight] = sums_over_rows<1>(
        x, rows, args.width,
        [&](int64_t begin, int64_t end, auto sums) { kernel(args, begin, end, sums[0]); });
    return {grad_x, to_dtype(grad_weight, weight.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor y, Tensor rstd)");
    m.def(
        "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset) "
        "-> (Tensor y, Tensor hidden, Tensor rstd)");
    m.def(
        "_rms_norm_backward(Tensor grad_y, Tensor? grad_hidden, Tensor hidden, Tensor weight, "
        "Tensor rstd, "
        "float offset, bool weight_gradient) -> (Tensor grad_hidden, Tensor grad_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    m.impl("rms_norm", TORCH_BOX(&rms_norm));
    m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
    m.impl("_rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace mllama
