#include "kernels/cpu/lora_linear.h"

#include "core/rows.h"
#include "core/tensor.h"

namespace mllama {
namespace {

using kernels::LowRank;

void check_sizes(const char* op, const Tensor& x, const Tensor& weight, const Tensor& a,
                 const Tensor& b) {
    dtype_of(op, "x", x);
    dtype_of(op, "weight", weight);
    dtype_of(op, "lora_a", a);
    dtype_of(op, "lora_b", b);
    check_value(x.dim() >= 1, op, ": x must have at least one dimension");
    int64_t width = last_size(x);
    check_value(weight.dim() == 2 && weight.size(1) == width, op, ": weight must be [out, ", width,
                "] for x ", Shape{x}, ", got ", Shape{weight});
    check_value(a.dim() == 2 && a.size(0) > 0 && a.size(1) == width, op, ": lora_a must be [rank, ",
                width, "] with rank > 0 for x ", Shape{x}, ", got ", Shape{a});
    check_value(b.dim() == 2 && b.size(0) == weight.size(0) && b.size(1) == a.size(0), op,
                ": lora_b must be [", weight.size(0), ", ", a.size(0),
                "], out of weight and rank of lora_a, got ", Shape{b});
}

std::vector<int64_t> with_last(const Tensor& x, int64_t size) {
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = size;
    return sizes;
}

Tensor as_rows(const Tensor& t) { return as_matrix(dense(t), row_count(t), last_size(t)); }

// A product between rows x, a factor (lora_a, or lora_b `by_column`) and small, all dense; one of
// them is written.
LowRank product(const Tensor& x, const Tensor& factor, bool by_column, const Tensor& small,
                double scale) {
    return {.rows = row_count(x),
            .width = last_size(x),
            .rank = last_size(small),
            .dtype = dtype_of("lora_linear", "x", x),
            .factor_dtype = dtype_of("lora_linear", "factor", factor),
            .by_column = by_column,
            .scale = static_cast<float>(scale),
            .dropout = false,
            .threshold = 0,
            .seed = 0,
            .x = const_cast<void*>(x.const_data_ptr()),
            .factor = const_cast<void*>(factor.const_data_ptr()),
            .small = const_cast<float*>(data<float>(small))};
}

// The same of dropout(x).
LowRank with_dropout(const char* op, LowRank args, double dropout,
                     const std::optional<Tensor>& seed) {
    check_value(0 <= dropout && dropout < 1, op, ": dropout must be at least 0 and below 1, got ",
                dropout);
    if (dropout == 0) return args;
    check_value(seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, op,
                ": dropout needs a seed, int64 [1]");
    args.scale /= static_cast<float>(1 - dropout);
    args.dropout = true;
    args.threshold = static_cast<uint32_t>(dropout * 4294967296.0);
    args.seed = *data<int64_t>(*seed);
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
                                       const Tensor& lora_b, const std::optional<Tensor>& bias,
                                       const std::optional<Tensor>& seed, double scale,
                                       double dropout) {
    const char* op = "lora_linear";
    check_sizes(op, x, weight, lora_a, lora_b);
    int64_t out = weight.size(0), rank = lora_a.size(0);
    std::optional<Tensor> shift;
    if (bias) {
        dtype_of(op, "bias", *bias);
        check_value(bias->dim() == 1 && bias->size(0) == out, op, ": bias must be [", out,
                    "], got ", Shape{*bias});
        shift = to_dtype(*bias, x.scalar_type());
    }
    Tensor rows = as_rows(x), a = dense(lora_a), b = dense(lora_b);
    Tensor y = new_tensor(x, with_last(x, out)), small = new_float(x, with_last(x, rank));
    down(with_dropout(op, product(rows, a, false, small, 1), dropout, seed));
    linear_out(rows, to_dtype(weight, x.scalar_type()), shift, as_rows(y));
    up(product(y, b, true, small, scale));
    return {y, small};
}

// Each gradient is empty unless asked for. `small` is the forward pass's second result.
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const std::optional<Tensor>& bias, const Tensor& small,
    const std::optional<Tensor>& seed, double scale, double dropout, bool x_gradient,
    bool a_gradient, bool b_gradient, bool bias_gradient) {
    const char* op = "_lora_linear_backward";
    check_sizes(op, x, weight, lora_a, lora_b);
    check_value(grad_y.dim() == x.dim() && last_size(grad_y) == weight.size(0) &&
                    row_count(grad_y) == row_count(x) && grad_y.scalar_type() == x.scalar_type(),
                op, ": grad_y must be [..., ", weight.size(0), "] and of x's dtype");
    check_value(
        small.numel() == row_count(x) * lora_a.size(0) && small.scalar_type() == ScalarType::Float,
        op, ": small must be float32 with [rank] values a row");
    Tensor g = as_rows(grad_y), rows = as_rows(x), a = dense(lora_a), b = dense(lora_b);
    Tensor grad_x = new_tensor(x, {0}), grad_a = new_tensor(lora_a, {0}),
           grad_b = new_tensor(lora_b, {0});
    Tensor grad_bias = new_tensor(bias.value_or(weight), {0});
    Tensor grad_small = new_float(x, small.sizes());
    if (x_gradient || a_gradient) down(product(g, b, true, grad_small, scale));
    if (b_gradient) {
        grad_b = new_like(b);
        outer(product(g, grad_b, true, dense(small), scale));
    }
    if (a_gradient) {
        grad_a = new_like(a);
        outer(with_dropout(op, product(rows, grad_a, false, grad_small, 1), dropout, seed));
    }
    if (x_gradient) {
        grad_x = torch::stable::view(torch::stable::matmul(g, to_dtype(weight, x.scalar_type())),
                                     x.sizes());
        up(with_dropout(op, product(grad_x, a, false, grad_small, 1), dropout, seed));
    }
    if (bias_gradient && bias) {
        int64_t dim = 0;
        grad_bias = torch::stable::sum(g, Sizes(&dim, 1), false, bias->scalar_type());
    }
    return {grad_x, grad_a, grad_b, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    m.def(
        "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? "
        "seed, float scale, "
        "float dropout) -> (Tensor y, Tensor small)");
    m.def(
        "_lora_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor lora_a, Tensor "
        "lora_b, Tensor? bias, "
        "Tensor small, Tensor? seed, float scale, float dropout, bool x_gradient, bool a_gradient, "
        "bool b_gradient, "
        "bool bias_gradient) -> (Tensor grad_x, Tensor grad_a, Tensor grad_b, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    m.impl("lora_linear", TORCH_BOX(&lora_linear));
    m.impl("_lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

}  // namespace mllama
