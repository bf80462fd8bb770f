// lora_linear: schemas, checks, and all but the products of low rank, shared by all devices.
#pragma once

#include "kernels/cpu/lora_linear.h"
#include "ops/frozen_weight.h"

namespace mllama {

// Lists have an entry for each of the layers of x; biases may be empty. The packing of a dense
// weight is kDense.
constexpr char kLoraLinearSchema[] =
    "lora_linear(Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor[] biases, "
    "Tensor? seeds, float[] scales, float[] dropouts, int[] packings) "
    "-> (Tensor[] ys, Tensor small)";
constexpr char kLoraLinearBackwardSchema[] =
    "_lora_linear_backward(Tensor[] grad_ys, Tensor x, Tensor[] weights, Tensor[] lora_a, "
    "Tensor[] lora_b, Tensor[] biases, Tensor small, Tensor? seeds, float[] scales, "
    "float[] dropouts, int[] packings, bool x_gradient, bool a_gradient, bool b_gradient, "
    "bool bias_gradient) "
    "-> (Tensor grad_x, Tensor grad_a, Tensor[] grad_b, Tensor[] grad_biases)";

using Tensors = std::vector<Tensor>;

// Factors, or rows of several at once, and the columns of small that they have.
struct LowRankFactor {
    Tensor factor;
    Dtype dtype;
    int64_t rank, column;
    double scale, dropout;
    MaybeTensor seed;  // int64 [1], with dropout

    int64_t out() const { return factor.size(0); }  // of lora_b
};

// The arguments of all layers, checked.
struct LoraLinearArgs {
    LoraLinearArgs(const char* op, const Tensor& x_, size_t count, const Tensors& a_,
                   const Tensors& b_, const Tensors& biases_, const MaybeTensor& seeds,
                   const std::vector<double>& scales, const std::vector<double>& dropouts)
        : dtype(dtype_of(op, "x", x_)) {
        check(x_.dim() >= 1, op, "x");
        check(count > 0, op, "weight");
        check(a_.size() == count, op, "lora_a");
        check(b_.size() == count, op, "lora_b");
        check(biases_.empty() || biases_.size() == count, op, "bias");
        check(scales.size() == count, op, "scale");
        check(dropouts.size() == count, op, "dropout");
        x = as_rows(x_);
        for (size_t i = 0; i < count; ++i) {
            add_layer(op, a_[i], b_[i], scales[i]);
            if (!biases_.empty()) add_bias(op, biases_[i]);
            add_dropout(op, seeds, dropouts[i], i);
        }
        if (!dropped) join();
    }

    Dtype dtype;
    int64_t ranks = 0;             // of all layers
    bool dropped = false;          // in any of them
    Tensor x;                      // [rows, in]
    Tensors biases;                // [out], in x's dtype, or none
    std::vector<LowRankFactor> a;  // [rank, in]; without dropout one for all layers
    std::vector<LowRankFactor> b;  // [out, rank]

  private:
    void add_layer(const char* op, const Tensor& a_, const Tensor& b_, double scale) {
        Dtype a_dtype = dtype_of(op, "lora_a", a_), b_dtype = dtype_of(op, "lora_b", b_);
        check(a_.dim() == 2 && a_.size(0) > 0 && a_.size(1) == x.size(1), op, "lora_a");
        check(a.empty() || a_dtype == a[0].dtype, op, "lora_a");
        check(b_.dim() == 2 && b_.size(1) == a_.size(0), op, "lora_b");
        int64_t rank = a_.size(0);
        a.push_back({dense(a_), a_dtype, rank, ranks, 1, 0, std::nullopt});
        b.push_back({dense(b_), b_dtype, rank, ranks, scale, 0, std::nullopt});
        ranks += rank;
    }
    void add_bias(const char* op, const Tensor& bias) {
        dtype_of(op, "bias", bias);
        check(bias.dim() == 1 && bias.size(0) == b.back().out(), op, "bias");
        biases.push_back(to_dtype(bias, x.scalar_type()));
    }
    void add_dropout(const char* op, const MaybeTensor& seeds, double dropout, size_t layer) {
        check(0 <= dropout && dropout < 1, op, "dropout");
        if (dropout == 0) return;
        check(seeds && seeds->scalar_type() == ScalarType::Long && seeds->dim() == 1 &&
                  seeds->size(0) > static_cast<int64_t>(layer),
              op, "seed");
        Tensor list = *seeds;
        a.back().seed = torch::stable::narrow(list, 0, static_cast<int64_t>(layer), 1);
        a.back().dropout = dropout;
        dropped = true;
    }
    // All of lora_a in one matrix, so that x is read once.
    void join() {
        if (a.size() == 1) return;
        std::array<int64_t, 2> sizes{ranks, x.size(1)};
        Tensor all = new_tensor(a[0].factor, Sizes(sizes.data(), 2));
        for (const LowRankFactor& one : a) {
            Tensor rows = torch::stable::narrow(all, 0, one.column, one.rank);
            torch::stable::copy_(rows, one.factor);
        }
        a = {{all, a[0].dtype, ranks, 0, 1, 0, std::nullopt}};
    }
};

// A product of two among rows x, a factor (of lora_a, or of lora_b `by_column`) and its columns of
// small [rows, ranks]; the third is written.
struct LowRankProduct {
    LowRankProduct(const LoraLinearArgs& l, const Tensor& x, const LowRankFactor& f, bool by_column,
                   const Tensor& small)
        : args{.rows = x.size(0),
               .width = x.size(1),
               .rank = f.rank,
               .stride = l.ranks,
               .dtype = l.dtype,
               .factor_dtype = f.dtype,
               .by_column = by_column,
               .scale = static_cast<float>(f.scale),
               .dropout = false,
               .threshold = 0,
               .seed = 0,
               .x = const_cast<void*>(x.const_data_ptr()),
               .factor = const_cast<void*>(f.factor.const_data_ptr()),
               .small = const_cast<float*>(data<float>(small)) + f.column},
          x(x),
          factor(f.factor),
          small(small) {
        if (!f.seed) return;
        args.scale /= static_cast<float>(1 - f.dropout);
        args.dropout = true;
        args.threshold = static_cast<uint32_t>(f.dropout * 4294967296.0);
        seed = f.seed;
    }

    kernels::LowRank args;  // without the seed's value, which may be in another device's memory
    Tensor x, factor, small;
    MaybeTensor seed;
};

// What a device has: down, up and outer of a LowRankProduct, as kernels/cpu/lora_linear.h, and
// Unpack, FrozenWeight's device.
template <class Device>
struct LoraLinear {
    using Weights = std::vector<FrozenWeight<typename Device::Unpack>>;

    static std::tuple<Tensors, Tensor> forward(const Tensor& x, Tensors weights, Tensors lora_a,
                                               Tensors lora_b, Tensors biases,
                                               const MaybeTensor& seeds, std::vector<double> scales,
                                               std::vector<double> dropouts,
                                               std::vector<int64_t> packings) {
        const char* op = "lora_linear";
        LoraLinearArgs l(op, x, weights.size(), lora_a, lora_b, biases, seeds, scales, dropouts);
        Weights frozen = frozen_weights(op, l, weights, packings);
        Tensor small = new_float(x, with_last(x, l.ranks));
        for (const LowRankFactor& a : l.a) Device::down(LowRankProduct(l, l.x, a, false, small));
        Tensors ys;
        for (size_t i = 0; i < l.b.size(); ++i) {
            Tensor y = new_tensor(x, with_last(x, l.b[i].out())), rows = as_rows(y);
            frozen[i].multiply(l.x, l.biases.empty() ? std::nullopt : MaybeTensor(l.biases[i]),
                               rows);
            Device::up(LowRankProduct(l, rows, l.b[i], true, small));
            ys.push_back(y);
        }
        return {ys, small};
    }

    // Each gradient is empty unless requested; those of lora_a are the rows of one tensor. `small`
    // is the forward pass's second result.
    static std::tuple<Tensor, Tensor, Tensors, Tensors> backward(
        Tensors grad_ys, const Tensor& x, Tensors weights, Tensors lora_a, Tensors lora_b,
        Tensors biases, const Tensor& small, const MaybeTensor& seeds, std::vector<double> scales,
        std::vector<double> dropouts, std::vector<int64_t> packings, bool x_gradient,
        bool a_gradient, bool b_gradient, bool bias_gradient) {
        const char* op = "_lora_linear_backward";
        LoraLinearArgs l(op, x, weights.size(), lora_a, lora_b, biases, seeds, scales, dropouts);
        Weights frozen = frozen_weights(op, l, weights, packings);
        Tensors grads = checked(op, l, x, grad_ys);
        check(small.numel() == row_count(x) * l.ranks && small.scalar_type() == ScalarType::Float,
              op, "small");
        Tensor small_rows = as_rows(small), grad_small = new_float(x, small.sizes());
        Tensor grad_x = new_tensor(x, {0}), grad_a = new_tensor(lora_a[0], {0});
        Tensors grad_b, grad_biases;
        for (size_t i = 0; i < grads.size(); ++i) {
            LowRankFactor b = l.b[i];
            if (x_gradient || a_gradient)
                Device::down(LowRankProduct(l, grads[i], b, true, grad_small));
            b.factor = b_gradient ? new_like(b.factor) : new_tensor(b.factor, {0});
            if (b_gradient) Device::outer(LowRankProduct(l, grads[i], b, true, small_rows));
            grad_b.push_back(b.factor);
            if (l.biases.empty()) continue;
            int64_t dim = 0;
            grad_biases.push_back(bias_gradient ? torch::stable::sum(grads[i], Sizes(&dim, 1),
                                                                     false, biases[i].scalar_type())
                                                : new_tensor(biases[i], {0}));
        }
        if (a_gradient) {
            std::array<int64_t, 2> sizes{l.ranks, l.x.size(1)};
            grad_a = new_tensor(lora_a[0], Sizes(sizes.data(), 2));
            for (LowRankFactor a : l.a) {
                a.factor = torch::stable::narrow(grad_a, 0, a.column, a.rank);
                Device::outer(LowRankProduct(l, l.x, a, false, grad_small));
            }
        }
        if (x_gradient) {
            Tensor rows = frozen[0].gradient(grads[0]);
            for (size_t i = 1; i < grads.size(); ++i) frozen[i].add_gradient(grads[i], rows);
            for (const LowRankFactor& a : l.a)
                Device::up(LowRankProduct(l, rows, a, false, grad_small));
            grad_x = torch::stable::view(rows, x.sizes());
        }
        return {grad_x, grad_a, grad_b, grad_biases};
    }

  private:
    static Tensors checked(const char* op, const LoraLinearArgs& l, const Tensor& x,
                           const Tensors& grad_ys) {
        check(grad_ys.size() == l.b.size(), op, "grad_y");
        Tensors rows;
        for (size_t i = 0; i < grad_ys.size(); ++i) {
            const Tensor& g = grad_ys[i];
            check(g.dim() == x.dim() && last_size(g) == l.b[i].out() &&
                      row_count(g) == row_count(x) && g.scalar_type() == x.scalar_type(),
                  op, "grad_y");
            rows.push_back(as_rows(g));
        }
        return rows;
    }
    static Weights frozen_weights(const char* op, const LoraLinearArgs& l, const Tensors& weights,
                                  const std::vector<int64_t>& packings) {
        check(packings.size() == weights.size(), op, "packing");
        Weights frozen;
        for (size_t i = 0; i < weights.size(); ++i)
            frozen.emplace_back(op, weights[i], packings[i], l.b[i].out(), l.x);
        return frozen;
    }
};

}  // namespace mllama
