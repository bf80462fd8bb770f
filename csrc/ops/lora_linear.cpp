#include "ops/lora_linear.h"

#include "core/threads.h"
#include "kernels/cpu/lora_linear.h"

namespace mllama {
namespace {

using kernels::LowRank;

// A product of two among rows x, a factor (lora_a, or lora_b `by_column`) and small, all
// contiguous; the third is written.
LowRank product(const LoraLinearArgs& l, const Tensor& x, const Tensor& factor, bool by_column,
                const Tensor& small, double scale) {
    return {.rows = x.size(0),
            .width = x.size(1),
            .rank = l.rank,
            .dtype = l.dtype,
            .factor_dtype = by_column ? l.b_dtype : l.a_dtype,
            .by_column = by_column,
            .scale = static_cast<float>(scale),
            .dropout = false,
            .threshold = 0,
            .seed = 0,
            .x = const_cast<void*>(x.const_data_ptr()),
            .factor = const_cast<void*>(factor.const_data_ptr()),
            .small = const_cast<float*>(data<float>(small))};
}

// The same with dropout(x).
LowRank with_dropout(const LoraLinearArgs& l, LowRank args) {
    if (!l.seed) return args;
    args.scale /= static_cast<float>(1 - l.dropout);
    args.dropout = true;
    args.threshold = static_cast<uint32_t>(l.dropout * 4294967296.0);
    args.seed = *data<int64_t>(*l.seed);
    return args;
}

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

void down(const LowRank& args) {
    auto kernel = MLLAMA_CALL(low_rank_down);
    parallel_for(blocks_of(args.rows, kernels::kRowBlock), 1,
                 [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

void up(const LowRank& args) {
    auto kernel = MLLAMA_CALL(low_rank_up);
    parallel_for(
        blocks_of(args.width, kernels::kUpColumns) * blocks_of(args.rows, kernels::kRowBlock),
        row_grain(kernels::kUpColumns * args.rank),
        [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

void outer(const LowRank& args) {
    auto kernel = MLLAMA_CALL(low_rank_outer);
    parallel_for(blocks_of(args.width, kernels::kOuterColumns),
                 row_grain(kernels::kOuterColumns * args.rows),
                 [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                       const Tensor& lora_b, const MaybeTensor& bias,
                                       const MaybeTensor& seed, double scale, double dropout) {
    LoraLinearArgs l("lora_linear", x, weight, lora_a, lora_b, bias, seed, scale, dropout);
    Tensor y = new_tensor(x, with_last(x, l.out)), small = new_float(x, with_last(x, l.rank));
    Tensor y_rows = as_rows(y);
    down(with_dropout(l, product(l, l.x, l.a, false, small, 1)));
    linear_out(l.x, l.weight, l.bias, y_rows);
    up(product(l, y_rows, l.b, true, small, scale));
    return {y, small};
}

// Each gradient is empty unless requested. `small` is the forward pass's second result.
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const MaybeTensor& bias, const Tensor& small, const MaybeTensor& seed,
    double scale, double dropout, bool x_gradient, bool a_gradient, bool b_gradient,
    bool bias_gradient) {
    const char* op = "_lora_linear_backward";
    LoraLinearArgs l(op, x, weight, lora_a, lora_b, bias, seed, scale, dropout);
    check(grad_y.dim() == x.dim() && last_size(grad_y) == l.out &&
              row_count(grad_y) == row_count(x) && grad_y.scalar_type() == x.scalar_type(),
          op, "grad_y");
    check(small.numel() == row_count(x) * l.rank && small.scalar_type() == ScalarType::Float, op,
          "small");
    Tensor g = as_rows(grad_y), grad_small = new_float(x, small.sizes());
    Tensor grad_x = new_tensor(x, {0}), grad_a = new_tensor(lora_a, {0}),
           grad_b = new_tensor(lora_b, {0}), grad_bias = new_tensor(bias.value_or(weight), {0});
    if (x_gradient || a_gradient) down(product(l, g, l.b, true, grad_small, scale));
    if (b_gradient) {
        grad_b = new_like(l.b);
        outer(product(l, g, grad_b, true, dense(small), scale));
    }
    if (a_gradient) {
        grad_a = new_like(l.a);
        outer(with_dropout(l, product(l, l.x, grad_a, false, grad_small, 1)));
    }
    if (x_gradient) {
        Tensor rows = torch::stable::matmul(g, l.weight);
        grad_x = torch::stable::view(rows, x.sizes());
        up(with_dropout(l, product(l, rows, l.a, false, grad_small, 1)));
    }
    if (bias_gradient && bias) {
        int64_t dim = 0;
        grad_bias = torch::stable::sum(g, Sizes(&dim, 1), false, bias->scalar_type());
    }
    return {grad_x, grad_a, grad_b, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    define(m, kLoraLinearSchema);
    define(m, kLoraLinearBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "lora_linear", TORCH_BOX(&lora_linear));
    implement(m, "_lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

}  // namespace mllama
