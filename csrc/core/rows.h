// What operators on rows share: how rows are counted, handed to threads, and summed over.
#pragma once

#include "core/tensor.h"

namespace mllama {

inline int64_t last_size(const Tensor& t) { return t.dim() ? t.size(t.dim() - 1) : 1; }
inline int64_t row_count(const Tensor& t) { return t.numel() / std::max<int64_t>(last_size(t), 1); }
inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// Rows a thread takes at least: about 16k elements, below which opening a parallel region costs more than it saves.
inline int64_t row_grain(int64_t width) { return std::max<int64_t>(16384 / std::max<int64_t>(width, 1), 1); }

// Sums over rows (a weight's gradient) are made in this many equal parts, each in order, then added in order. The count
// depends on the sizes alone, so the bits do not depend on the number of threads.
inline int64_t partial_sums(int64_t rows) { return std::clamp<int64_t>(rows / 32, 1, 16); }

// Calls body(first_row, last_row, part) for each part, on torch's threads.
template <class Body>
void for_row_parts(int64_t rows, int64_t width, int64_t parts, Body&& body) {
    int64_t size = (rows + parts - 1) / parts;
    int64_t grain = rows * width <= 16384 ? parts : 1;
    parallel_for(parts, grain, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part)
            body(std::min(part * size, rows), std::min((part + 1) * size, rows), part);
    });
}

// The parts [parts, width] in f32 added up, as a tensor like `like`.
inline Tensor add_parts(const Tensor& parts, const Tensor& like) {
    int64_t dim = 0;
    Tensor total = parts.size(0) == 1 ? torch::stable::select(parts, 0, 0)
                                      : torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1));
    return to_dtype(total, like.scalar_type());
}

}  // namespace mllama
