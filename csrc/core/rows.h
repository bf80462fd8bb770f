// What operators on rows share: how rows are counted, handed to threads, and summed over.
#pragma once

#include <array>
#include <memory>
#include <utility>

#include "core/tensor.h"

namespace mllama {

inline int64_t last_size(const Tensor& t) { return t.dim() ? t.size(t.dim() - 1) : 1; }
inline int64_t row_count(const Tensor& t) {
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
    return rows;
}
inline std::vector<int64_t> sizes_of(const Tensor& t) {
    return {t.sizes().begin(), t.sizes().end()};
}

// A tensor whose rows are dense and evenly spaced, with the stride from row to row: t itself where
// it is so already (a half of a wider projection), else a contiguous copy.
inline std::pair<Tensor, int64_t> dense_rows(const Tensor& t) {
    int64_t dim = t.dim(), stride = last_size(t), rows = 1;
    bool even = dim == 0 || t.size(dim - 1) <= 1 || t.stride(dim - 1) == 1;
    for (int64_t d = dim - 2; even && d >= 0; --d) {
        if (t.size(d) == 1) continue;
        if (rows == 1) stride = t.stride(d);
        even = t.stride(d) == stride * rows;
        rows *= t.size(d);
    }
    if (even) return {t, stride};
    return {torch::stable::contiguous(t), last_size(t)};
}

// Elements a thread takes at least: below this, opening a parallel region costs more than it saves.
constexpr int64_t kGrain = 16384;
inline int64_t row_grain(int64_t width) {
    return std::max<int64_t>(kGrain / std::max<int64_t>(width, 1), 1);
}

// Sums over rows, as gradients of weights are: `body(first_row, last_row, sums)` adds its rows'
// share to sums[0] ... sums[N - 1], float arrays of `width` zeros at first. Returns N float32
// tensors [width] on like's device. Rows are cut into equal parts, each summed in order, and the
// parts are added in order. How many there are depends on the sizes alone, so the bits do not
// depend on the number of threads.
template <size_t N, class Body>
std::array<Tensor, N> sums_over_rows(const Tensor& like, int64_t rows, int64_t width, Body&& body) {
    int64_t parts = std::clamp<int64_t>(rows / 32, 1, 16), part_rows = (rows + parts - 1) / parts,
            size = N * width;
    std::unique_ptr<float[]> memory(new float[parts * size]());
    parallel_for(parts, rows * width <= kGrain ? parts : 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            std::array<float*, N> sums;
            for (size_t i = 0; i < N; ++i) sums[i] = &memory[part * size + i * width];
            body(std::min(part * part_rows, rows), std::min((part + 1) * part_rows, rows), sums);
        }
    });
    for (int64_t part = 1; part < parts; ++part) {
        for (int64_t i = 0; i < size; ++i) memory[i] += memory[part * size + i];
    }
    std::array<Tensor, N> totals;
    for (size_t i = 0; i < N; ++i) {
        totals[i] = new_float(like, Sizes(&width, 1));
        std::copy_n(&memory[i * width], width, mutable_data<float>(totals[i]));
    }
    return totals;
}

}  // namespace mllama
