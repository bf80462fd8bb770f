#include "core/launcher.h"
#include "kernels/cuda/rms_norm.h"
#include "ops/rms_norm.h"

namespace mllama {
namespace {

void run(const char* op, const RmsNormArgs& a) {
    Launcher launcher(op, a.x);
    launcher.reads("x", a.x);
    launcher.reads("weight", a.weight);
    launcher.writes("y", a.y);
    launcher.writes("rstd", a.rstd);
    if (a.residual) {
        launcher.reads("residual", *a.residual);
        launcher.writes("hidden", a.hidden);
    }
    cuda::rms_norm(a.kernel(), row_count(a.x), launcher.stream());
    launcher.done();
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                    double offset) {
    RmsNormArgs args("rms_norm", x, std::nullopt, weight, eps, offset);
    run("rms_norm", args);
    return {args.y, args.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                                const Tensor& weight, double eps, double offset) {
    RmsNormArgs args("add_rms_norm", x, residual, weight, eps, offset);
    run("add_rms_norm", args);
    return {args.y, args.hidden, args.rstd};
}

// The weight's gradient is empty unless requested.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, const MaybeTensor& grad_hidden,
                                             const Tensor& hidden, const Tensor& weight,
                                             const Tensor& rstd, double offset,
                                             bool weight_gradient) {
    const char* op = "_rms_norm_backward";
    RmsNormBackwardArgs a(op, grad_y, grad_hidden, hidden, weight, rstd, offset);
    int64_t rows = row_count(a.hidden), width = last_size(a.hidden);
    Launcher launcher(op, a.hidden);
    launcher.reads("grad_y", a.grad_y);
    launcher.reads("hidden", a.hidden);
    launcher.reads("weight", a.weight);
    launcher.reads("rstd", a.rstd);
    launcher.writes("grad_x", a.grad_x);
    if (a.grad_hidden) launcher.reads("grad_hidden", *a.grad_hidden);
    cuda::rms_norm_backward(a.kernel(), rows, launcher.stream());
    Tensor grad_weight = new_tensor(a.weight, {0});
    if (weight_gradient) {
        grad_weight = new_like(a.weight);
        Tensor parts = new_float(a.hidden, {cuda::column_parts(rows), width});
        launcher.writes("grad_weight", grad_weight);
        launcher.writes("parts", parts);
        cuda::rms_norm_weight_gradient(
            a.kernel(), {mutable_data<float>(parts), {grad_weight.mutable_data_ptr()}}, rows,
            launcher.stream());
    }
    launcher.done();
    return {a.grad_x, to_dtype(grad_weight, weight.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) {
    implement(m, "rms_norm", TORCH_BOX(&rms_norm));
    implement(m, "add_rms_norm", TORCH_BOX(&add_rms_norm));
    implement(m, "_rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace mllama
