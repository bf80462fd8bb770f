#include "ops/rms_norm.h"

#include "core/threads.h"

namespace mllama {
namespace {

void run(const RmsNormArgs& a) {
    kernels::RmsNorm args = a.kernel();
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
    kernels::RmsNormBackward args = a.kernel();
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
