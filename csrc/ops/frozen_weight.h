// Products with the frozen weight of a linear layer, by torch's matrix product. A packed weight is
// dequantized a tile at a time: no dense copy of it is ever in memory.
#pragma once

#include "ops/packed_linear.h"

namespace mllama {

constexpr int64_t kDense = -1;  // in place of a packing

// A weight [out, in]. A Device has kTileElements, the size of a tile; readable(weight), a packed
// weight where its kernels can read it; unpack(args, first, last, weight, tile), which dequantizes
// the rows of the blocks [first, last); and kFloatColumns, the columns of a float32 product that
// torch shall make at a time.
template <class Device>
class FrozenWeight {
  public:
    // For rows of x; `weight` is dense, of any of the dtypes, or packed as `packing` says.
    FrozenWeight(const char* op, const Tensor& weight, int64_t packing, int64_t out,
                 const Tensor& x)
        : out_(out), in_(last_size(x)), dtype_(dtype_of(op, "x", x)), weight_(weight) {
        if (packing == kDense) {
            dtype_of(op, "weight", weight);
            check(weight.dim() == 2 && weight.size(0) == out && weight.size(1) == in_, op,
                  "weight");
            weight_ = to_dtype(weight, x.scalar_type());
        } else {
            packing_ = packing_of(op, packing);
            check_packed(op, weight, *packing_, out, in_);
            weight_ = Device::readable(weight);
        }
    }

    // y [rows, out] = x [rows, in] W' + bias, contiguous, of x's dtype
    void multiply(const Tensor& x, const MaybeTensor& bias, Tensor& y) const {
        if (!packing_) {
            return for_columns(y, [&](int64_t first, int64_t count) {
                MaybeTensor part = bias;
                if (bias) part = piece(*part, 0, first, count);
                linear_out(x, piece(weight_, 0, first, count), part, piece(y, 1, first, count));
            });
        }
        int64_t step = tile_size(in_, kernels::kLanes);
        Tensor memory = new_tensor(x, {std::min(step, out_) * in_});
        for (int64_t row = 0; row < out_; row += step) {
            int64_t rows = std::min(step, out_ - row);
            Tensor tile = unpack(memory, row, rows, 0, in_);
            MaybeTensor part = bias;
            if (bias) part = torch::stable::narrow(*part, 0, row, rows);
            linear_out(x, tile, part, torch::stable::narrow(y, 1, row, rows));
        }
    }

    // g [rows, out] W, contiguous, of g's dtype. Tiles have all rows of some inputs: no result is a
    // sum of rounded ones.
    Tensor gradient(const Tensor& g) const {
        Tensor x = new_tensor(g, {g.size(0), in_});
        for_tiles(x, [&](const Tensor& tile, const Tensor& part) { matmul_out(g, tile, part); });
        return x;
    }
    // x [rows, in] += g W
    void add_gradient(const Tensor& g, Tensor& x) const {
        auto add = [&](Tensor w, const Tensor& part) {
            linear_out(g, torch::stable::transpose(w, 0, 1), part, part);
        };
        for_tiles(x, add);
    }

  private:
    static Tensor piece(Tensor t, int64_t dim, int64_t first, int64_t count) {
        return count == t.size(dim) ? t : torch::stable::narrow(t, dim, first, count);
    }

    // Calls body(first, count) for all columns of a product with the dense weight, some at a time
    // where that is faster.
    template <class Body>
    void for_columns(const Tensor& product, Body&& body) const {
        int64_t size = product.size(1), step = std::max<int64_t>(size, 1);
        if (dtype_ == Dtype::f32 && product.size(0) >= 16 && size >= 2 * Device::kFloatColumns)
            step = Device::kFloatColumns;
        for (int64_t first = 0; first < size; first += step)
            body(first, std::min(step, size - first));
    }

    // Calls body(columns of the weight [out, width], those of x [rows, width]) for all columns.
    template <class Body>
    void for_tiles(Tensor& x, Body&& body) const {
        if (!packing_) {
            return for_columns(x, [&](int64_t first, int64_t count) {
                body(piece(weight_, 1, first, count), piece(x, 1, first, count));
            });
        }
        int64_t step = tile_size(out_, kernels::kGroup);
        Tensor memory = new_tensor(x, {std::min(step, in_) * out_});
        for (int64_t first = 0; first < in_; first += step) {
            int64_t width = std::min(step, in_ - first);
            body(unpack(memory, 0, out_, first, width), torch::stable::narrow(x, 1, first, width));
        }
    }

    // How many rows of this length a tile has, or columns, a multiple of `part`.
    static int64_t tile_size(int64_t length, int64_t part) {
        return std::max<int64_t>(Device::kTileElements / std::max<int64_t>(length, 1) / part, 1) *
               part;
    }

    // [rows, width]: the rows from `row` on, a multiple of kLanes, and inputs from `first` on.
    Tensor unpack(const Tensor& memory, int64_t row, int64_t rows, int64_t first,
                  int64_t width) const {
        Tensor tile = as_matrix(memory, rows, width);
        int64_t block = row / kernels::kLanes;
        kernels::PackWeight args{.packing = *packing_,
                                 .dtype = dtype_,
                                 .in = in_,
                                 .out = out_,
                                 .first = first,
                                 .width = width,
                                 .dense = tile.mutable_data_ptr(),
                                 .packed = const_cast<uint8_t*>(data<uint8_t>(weight_))};
        Device::unpack(args, block, block + kernels::block_count(rows), weight_, tile);
        return tile;
    }

    int64_t out_, in_;
    Dtype dtype_;  // of x
    Tensor weight_;
    std::optional<kernels::Packing> packing_;  // none: dense
};

constexpr char kDequantizedLinearSchema[] =
    "dequantized_linear(Tensor x, Tensor weight, Tensor? bias, int out, int packing) -> Tensor";
constexpr char kDequantizedLinearBackwardSchema[] =
    "_dequantized_linear_backward(Tensor grad_y, Tensor weight, int width, int packing) -> Tensor";

template <class Device>
struct DequantizedLinear {
    static Tensor forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias_,
                          int64_t out, int64_t packing) {
        const char* op = "dequantized_linear";
        check(x.dim() >= 1, op, "x");
        packing_of(op, packing);  // not dense
        FrozenWeight<Device> frozen(op, weight, packing, out, x);
        MaybeTensor bias;
        if (bias_) {
            dtype_of(op, "bias", *bias_);
            check(bias_->dim() == 1 && bias_->size(0) == out, op, "bias");
            bias = to_dtype(*bias_, x.scalar_type());
        }
        Tensor y = new_tensor(x, with_last(x, out));
        Tensor rows = as_matrix(y, row_count(x), out);
        if (y.numel()) frozen.multiply(as_rows(x), bias, rows);
        return y;
    }

    static Tensor backward(const Tensor& grad_y, const Tensor& weight, int64_t width,
                           int64_t packing) {
        const char* op = "_dequantized_linear_backward";
        check(grad_y.dim() >= 1, op, "grad_y");
        check(width >= 0, op, "width");
        packing_of(op, packing);
        std::vector<int64_t> sizes = with_last(grad_y, width);
        Tensor like = new_tensor(grad_y, {0, width});
        FrozenWeight<Device> frozen(op, weight, packing, last_size(grad_y), like);
        return torch::stable::view(frozen.gradient(as_rows(grad_y)), sizes);
    }
};

}  // namespace mllama
