// What operators on rows share: how the rows of a tensor are counted and laid out.
#pragma once

#include <utility>

#include "core/tensor.h"

namespace mllama {

inline int64_t last_size(const Tensor& t) { return t.dim() ? t.size(t.dim() - 1) : 1; }
inline int64_t row_count(const Tensor& t) {
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
    return rows;
}

// t's sizes with another last one.
inline std::vector<int64_t> with_last(const Tensor& t, int64_t size) {
    std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
    sizes.back() = size;
    return sizes;
}

// A contiguous copy or view as [rows, last size].
inline Tensor as_rows(const Tensor& t) { return as_matrix(dense(t), row_count(t), last_size(t)); }

inline bool same_kind(const Tensor& a, const Tensor& b) {
    return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type();
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

}  // namespace mllama
