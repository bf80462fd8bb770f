#include "ops/layer_norm.h"

#include "core/threads.h"

namespace mllama {
namespace {

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                      double eps) {
    LayerNormArgs a("layer_norm", x, weight, bias, eps);
    kernels::LayerNorm args = a.kernel();
    auto kernel = MLLAMA_CALL(layer_norm);
    parallel_for(row_count(a.x), row_grain(args.width),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return {a.y, a.statistics};
}

// The gradients of weight and bias are empty unless requested.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_y, const Tensor& x,
                                                       const Tensor& weight, const Tensor& bias,
                                                       const Tensor& statistics,
                                                       bool parameter_gradients) {
    LayerNormBackwardArgs a("_layer_norm_backward", grad_y, x, weight, bias, statistics);
    kernels::LayerNormBackward args = a.kernel();
    auto kernel = MLLAMA_CALL(layer_norm_backward);
    int64_t rows = row_count(a.x);
    if (!parameter_gradients) {
        parallel_for(rows, row_grain(args.width), [&](int64_t begin, int64_t end) {
            kernel(args, begin, end, nullptr, nullptr);
        });
        return {a.grad_x, new_tensor(weight, {0}), new_tensor(bias, {0})};
    }
    auto [grad_weight, grad_bias] = sums_over_rows<2>(
        a.x, rows, args.width,
        [&](int64_t begin, int64_t end, auto sums) { kernel(args, begin, end, sums[0], sums[1]); });
    return {a.grad_x, to_dtype(grad_weight, weight.scalar_type()),
            to_dtype(grad_bias, bias.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    define(m, kLayerNormSchema);
    define(m, kLayerNormBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "layer_norm", TORCH_BOX(&layer_norm));
    implement(m, "_layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace mllama
