#include "ops/rms_norm.h"

#include "core/threads.h"
#include "kernels/cpu/rms_norm.h"

namespace mllama {
namespace {

void run(const RmsNormArgs& a) {
    kernels::RmsNorm args{.dtype = a.dtype,
                          .weight_dtype = a.weight_dtype,
                          .width = last_size(a.x),
                          .eps = a.eps,
                          .offset = a.offset,
                          .x = a.x.const_data_ptr(),
                          .residual = a.residual ? a.residual->const_data_ptr() : nullptr,
                          .weight = a.weight.const_data_ptr(),
                          .hidden = a.residual ? a.hidden.mutable_data_ptr() : nullptr,
                          .y = a.y.mutable_data_ptr(),
                          .rstd = mutable_data<float>(a.rstd)};
    auto kernel = MLLAMA_CALL(rms_norm);
    parallel_for(row_count(a.x), row_grain(args.width),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                    double offset) {
    RmsNormArgs args("rms_norm", x, std::nullopt, weight, eps, offset);
    run(args);
    return {args.y, args.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                                const Tensor& weight, double eps, double offset) {
    RmsNormArgs args("add_rms_norm", x, residual, weight, eps, offset);
    run(args);
    return {args.y, args.hidden, args.rstd};
}

// The weight's gradient is empty unless requested.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, const MaybeTensor& grad_hidden,
                                             const Tensor& hidden, const Tensor& weight,
                                             const Tensor& rstd, double offset,
                                             bool weight_gradient) {
    RmsNormBackwardArgs a("_rms_norm_backward", grad_y, grad_hidden, hidden, weight, rstd, offset);
    kernels::RmsNormBackward args{
        .dtype = a.dtype,
        .weight_dtype = a.weight_dtype,
        .width = last_size(a.hidden),
        .offset = a.offset,
        .grad_y = a.grad_y.const_data_ptr(),
        .grad_hidden = a.grad_hidden ? a.grad_hidden->const_data_ptr() : nullptr,
        .x = a.hidden.const_data_ptr(),
        .weight = a.weight.const_data_ptr(),
        .rstd = data<float>(a.rstd),
        .grad_x = a.grad_x.mutable_data_ptr()};
    auto kernel = MLLAMA_CALL(rms_norm_backward);
    int64_t rows = row_count(a.hidden);
    if (!weight_gradient) {
        parallel_for(rows, row_grain(args.width),
                     [&](int64_t begin, int64_t end) { kernel(args, begin, end, nullptr); });
        return {a.grad_x, new_tensor(weight, {0})};
    }
    auto [grad_weight] = sums_over_rows<1>(
        a.hidden, rows, args.width,
        [&](int64_t begin, int64_t end, auto sums) { kernel(args, begin, end, sums[0]); });
    return {a.grad_x, to_dtype(grad_weight, weight.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    define(m, kRmsNormSchema);
    define(m, kAddRmsNormSchema);
    define(m, kRmsNormBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "rms_norm", TORCH_BOX(&rms_norm));
    implement(m, "add_rms_norm", TORCH_BOX(&add_rms_norm));
    implement(m, "_rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace mllama
