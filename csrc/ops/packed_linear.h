// packed_linear and its packing: schemas, checks and tensors, the same on every device.
#pragma once

#include "core/rows.h"
#include "kernels/cpu/packed_linear.h"

namespace mllama {

constexpr char kPackedLinearSchema[] =
    "packed_linear(Tensor x, Tensor weight, Tensor? bias, int out, int packing, "
    "int activation) -> Tensor";
constexpr char kPackWeightSchema[] = "pack_weight(Tensor weight, int packing) -> Tensor";
constexpr char kPackGgufSchema[] = "pack_gguf(Tensor blocks, int packing) -> Tensor";
constexpr char kUnpackWeightSchema[] =
    "unpack_weight(Tensor weight, Tensor? rows, int out, int width, int packing, "
    "ScalarType dtype) -> Tensor";

// Which of kernels::kPackings a number is.
inline kernels::Packing packing_of(const char* op, int64_t packing) {
    check(0 <= packing && packing < static_cast<int64_t>(std::size(kernels::kPackings)), op,
          "packing");
    return static_cast<kernels::Packing>(packing);
}

inline kernels::LinearActivation activation_of(const char* op, int64_t activation) {
    check(0 <= activation &&
              activation <= static_cast<int64_t>(kernels::LinearActivation::quick_gelu),
          op, "activation");
    return static_cast<kernels::LinearActivation>(activation);
}

constexpr int64_t kMostFeatures = int64_t{1} << 28;  // the bytes of so many squared are an int64

// Bytes of `out` rows of `in` weights.
inline void check_packed(const char* op, const Tensor& weight, kernels::Packing packing,
                         int64_t out, int64_t in) {
    check(out >= 0 && in >= 0 && out <= kMostFeatures && in <= kMostFeatures, op, "out");
    check(weight.dim() == 1 && weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() &&
              weight.numel() == kernels::block_count(out) * kernels::block_bytes(packing, in),
          op, "weight");
}

struct PackedLinearArgs {
    PackedLinearArgs(const char* op, const Tensor& x_, const Tensor& weight,
                     const MaybeTensor& bias_, int64_t out, int64_t packing_, int64_t activation_)
        : packing(packing_of(op, packing_)),
          activation(activation_of(op, activation_)),
          dtype(dtype_of(op, "x", x_)),
          weight(weight),
          out(out) {
        check(x_.dim() >= 1, op, "x");
        x = dense(x_);
        check_packed(op, weight, packing, out, last_size(x));
        y = new_tensor(x, with_last(x, out));
        if (!bias_) return;
        dtype_of(op, "bias", *bias_);
        check(bias_->dim() == 1 && bias_->size(0) == out, op, "bias");
        bias = dense(to_dtype(*bias_, ScalarType::Float));
    }

    kernels::PackedLinear kernel(const kernels::Activations& activations) const {
        return {.packing = packing,
                .dtype = dtype,
                .rows = row_count(x),
                .in = last_size(x),
                .out = out,
                .x = x.const_data_ptr(),
                .activations = activations,
                .weight = data<uint8_t>(weight),
                .bias = bias ? data<float>(*bias) : nullptr,
                .y = y.mutable_data_ptr(),
                .activation = activation};
    }

    kernels::Packing packing;
    kernels::LinearActivation activation;
    Dtype dtype;
    Tensor x;          // [..., in]
    Tensor weight;     // uint8, packed
    MaybeTensor bias;  // float32 [out]
    int64_t out;
    Tensor y;  // [..., out], in x's dtype
};

// All rows, or those that an int64 tensor names.
struct UnpackWeightArgs {
    UnpackWeightArgs(const char* op, const Tensor& weight, const MaybeTensor& rows_, int64_t out,
                     int64_t width, int64_t packing_, ScalarType type)
        : packing(packing_of(op, packing_)), weight(weight), out(out), width(width) {
        check_packed(op, weight, packing, out, width);
        if (rows_) {
            check(rows_->scalar_type() == ScalarType::Long && rows_->dim() == 1, op, "rows");
            rows = dense(*rows_);
        }
        Tensor like = new_tensor(weight, {0});
        dense_rows = torch::stable::new_empty(like, {rows ? rows->numel() : out, width}, type);
        dtype = dtype_of(op, "dtype", dense_rows);
    }

    kernels::PackWeight kernel() const {
        return {.packing = packing,
                .dtype = dtype,
                .in = width,
                .out = out,
                .first = 0,
                .width = width,
                .dense = dense_rows.mutable_data_ptr(),
                .packed = const_cast<uint8_t*>(data<uint8_t>(weight))};
    }

    kernels::Packing packing;
    Dtype dtype;
    Tensor weight;
    MaybeTensor rows;
    int64_t out, width;
    Tensor dense_rows;
};

}  // namespace mllama
