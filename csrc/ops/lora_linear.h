// lora_linear: schemas, checks, and all but the products of low rank, shared by all devices.
#pragma once

#include "kernels/cpu/lora_linear.h"
#include "ops/frozen_weight.h"

namespace mllama {

constexpr char kLoraLinearSchema[] =
    "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, "
    "Tensor? seed, float scale, float dropout, int packing=-1) -> (Tensor y, Tensor small)";
constexpr char kLoraLinearBackwardSchema[] =
    "_lora_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
    "Tensor? bias, Tensor small, Tensor? seed, float scale, float dropout, bool x_gradient, "
    "bool a_gradient, bool b_gradient, bool bias_gradient, int packing=-1) "
    "-> (Tensor grad_x, Tensor grad_a, Tensor grad_b, Tensor grad_bias)";

struct LoraLinearArgs {
    LoraLinearArgs(const char* op, const Tensor& x_, const Tensor& a_, const Tensor& b_,
                   const MaybeTensor& bias_, const MaybeTensor& seed_, double scale,
                   double dropout)
        : dtype(checked(op, x_, a_, b_)),
          a_dtype(dtype_of(op, "lora_a", a_)),
          b_dtype(dtype_of(op, "lora_b", b_)),
          x(as_rows(x_)),
          a(dense(a_)),
          b(dense(b_)),
          scale(scale),
          dropout(dropout),
          out(b_.size(0)),
          rank(a_.size(0)) {
        check(0 <= dropout && dropout < 1, op, "dropout");
        check(dropout == 0 ||
                  (seed_ && seed_->numel() == 1 && seed_->scalar_type() == ScalarType::Long),
              op, "seed");
        if (dropout > 0) seed = seed_;
        if (!bias_) return;
        dtype_of(op, "bias", *bias_);
        check(bias_->dim() == 1 && bias_->size(0) == out, op, "bias");
        bias = to_dtype(*bias_, x_.scalar_type());
    }

    Dtype dtype, a_dtype, b_dtype;
    Tensor x;          // [rows, in]
    Tensor a, b;       // [rank, in] and [out, rank]
    MaybeTensor bias;  // [out], in x's dtype
    MaybeTensor seed;  // int64 [1], with dropout
    double scale, dropout;
    int64_t out, rank;

  private:
    static Dtype checked(const char* op, const Tensor& x, const Tensor& a, const Tensor& b) {
        check(x.dim() >= 1, op, "x");
        check(a.dim() == 2 && a.size(0) > 0 && a.size(1) == last_size(x), op, "lora_a");
        check(b.dim() == 2 && b.size(1) == a.size(0), op, "lora_b");
        return dtype_of(op, "x", x);
    }
};

// A product of two among rows x, a factor (lora_a, or lora_b `by_column`) and small, all
// contiguous; the third is written.
struct LowRankProduct {
    LowRankProduct(const LoraLinearArgs& l, const Tensor& x, const Tensor& factor, bool by_column,
                   const Tensor& small, double scale)
        : args{.rows = x.size(0),
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
               .small = const_cast<float*>(data<float>(small))},
          x(x),
          factor(factor),
          small(small) {}
    // The same with dropout(x).
    LowRankProduct with_dropout(const LoraLinearArgs& l) const {
        LowRankProduct dropped = *this;
        if (!l.seed) return dropped;
        dropped.args.scale /= static_cast<float>(1 - l.dropout);
        dropped.args.dropout = true;
        dropped.args.threshold = static_cast<uint32_t>(l.dropout * 4294967296.0);
        dropped.seed = l.seed;
        return dropped;
    }

    kernels::LowRank args;  // without the seed's value, which may be in another device's memory
    Tensor x, factor, small;
    MaybeTensor seed;
};

// What a device has: down, up and outer of a LowRankProduct, as kernels/cpu/lora_linear.h, and
// Unpack, FrozenWeight's device.
template <class Device>
struct LoraLinear {
    using Weight = FrozenWeight<typename Device::Unpack>;

    static std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight,
                                              const Tensor& lora_a, const Tensor& lora_b,
                                              const MaybeTensor& bias, const MaybeTensor& seed,
                                              double scale, double dropout, int64_t packing) {
        const char* op = "lora_linear";
        LoraLinearArgs l(op, x, lora_a, lora_b, bias, seed, scale, dropout);
        Weight frozen(op, weight, packing, l.out, x);
        Tensor y = new_tensor(x, with_last(x, l.out)), small = new_float(x, with_last(x, l.rank));
        Tensor y_rows = as_rows(y);
        Device::down(LowRankProduct(l, l.x, l.a, false, small, 1).with_dropout(l));
        frozen.multiply(l.x, l.bias, y_rows);
        Device::up(LowRankProduct(l, y_rows, l.b, true, small, scale));
        return {y, small};
    }

    // Each gradient is empty unless requested. `small` is the forward pass's second result.
    static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
        const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
        const Tensor& lora_b, const MaybeTensor& bias, const Tensor& small, const MaybeTensor& seed,
        double scale, double dropout, bool x_gradient, bool a_gradient, bool b_gradient,
        bool bias_gradient, int64_t packing) {
        const char* op = "_lora_linear_backward";
        LoraLinearArgs l(op, x, lora_a, lora_b, bias, seed, scale, dropout);
        Weight frozen(op, weight, packing, l.out, x);
        check(grad_y.dim() == x.dim() && last_size(grad_y) == l.out &&
                  row_count(grad_y) == row_count(x) && grad_y.scalar_type() == x.scalar_type(),
              op, "grad_y");
        check(small.numel() == row_count(x) * l.rank && small.scalar_type() == ScalarType::Float,
              op, "small");
        Tensor g = as_rows(grad_y), grad_small = new_float(x, small.sizes());
        Tensor grad_x = new_tensor(x, {0}), grad_a = new_tensor(lora_a, {0}),
               grad_b = new_tensor(lora_b, {0}), grad_bias = new_tensor(bias.value_or(x), {0});
        if (x_gradient || a_gradient)
            Device::down(LowRankProduct(l, g, l.b, true, grad_small, scale));
        if (b_gradient) {
            grad_b = new_like(l.b);
            Device::outer(LowRankProduct(l, g, grad_b, true, dense(small), scale));
        }
        if (a_gradient) {
            grad_a = new_like(l.a);
            Device::outer(LowRankProduct(l, l.x, grad_a, false, grad_small, 1).with_dropout(l));
        }
        if (x_gradient) {
            Tensor rows = frozen.gradient(g);
            grad_x = torch::stable::view(rows, x.sizes());
            Device::up(LowRankProduct(l, rows, l.a, false, grad_small, 1).with_dropout(l));
        }
        if (bias_gradient && bias) {
            int64_t dim = 0;
            grad_bias = torch::stable::sum(g, Sizes(&dim, 1), false, bias->scalar_type());
        }
        return {grad_x, grad_a, grad_b, grad_bias};
    }
};

}  // namespace mllama
