#include "core/launcher.h"
#include "kernels/cuda/layer_norm.h"
#include "ops/layer_norm.h"

namespace mllama {
namespace {

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                      double eps) {
    LayerNormArgs a("layer_norm", x, weight, bias, eps);
    Launcher launcher("layer_norm", a.x);
    launcher.reads("x", a.x);
    launcher.reads("weight", a.weight);
    launcher.reads("bias", a.bias);
    launcher.writes("y", a.y);
    launcher.writes("statistics", a.statistics);
    cuda::layer_norm(a.kernel(), row_count(a.x), launcher.stream());
    launcher.done();
    return {a.y, a.statistics};
}

// The gradients of weight and bias are empty unless requested.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_y, const Tensor& x,
                                                       const Tensor& weight, const Tensor& bias,
                                                       const Tensor& statistics,
                                                       bool parameter_gradients) {
    const char* op = "_layer_norm_backward";
    LayerNormBackwardArgs a(op, grad_y, x, weight, bias, statistics);
    int64_t rows = row_count(a.x), width = last_size(a.x);
    Launcher launcher(op, a.x);
    launcher.reads("grad_y", a.grad_y);
    launcher.reads("x", a.x);
    launcher.reads("weight", a.weight);
    launcher.reads("bias", a.bias);
    launcher.reads("statistics", a.statistics);
    launcher.writes("grad_x", a.grad_x);
    cuda::layer_norm_backward(a.kernel(), rows, launcher.stream());
    Tensor grad_weight = new_tensor(a.weight, {0}), grad_bias = new_tensor(a.bias, {0});
    if (parameter_gradients) {
        grad_weight = new_like(a.weight);
        grad_bias = new_like(a.bias);
        Tensor parts = new_float(a.x, {2, cuda::column_parts(rows), width});
        launcher.writes("grad_weight", grad_weight);
        launcher.writes("grad_bias", grad_bias);
        launcher.writes("parts", parts);
        cuda::layer_norm_parameter_gradients(
            a.kernel(),
            {mutable_data<float>(parts),
             {grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr()}},
            rows, launcher.stream());
    }
    launcher.done();
    return {a.grad_x, to_dtype(grad_weight, weight.scalar_type()),
            to_dtype(grad_bias, bias.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) {
    implement(m, "layer_norm", TORCH_BOX(&layer_norm));
    implement(m, "_layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace mllama
