// Sums over rows, as gradients of weights are, in two steps: over parts of the rows, then over the
// parts. How many there are depends on the sizes alone, and so do the bits.
#pragma once

#include <cstdint>

namespace mllama::cuda {

constexpr int64_t column_parts(int64_t rows) {
    int64_t parts = rows / 32;
    return parts < 1 ? 1 : parts > 64 ? 64 : parts;
}

template <int N>
struct ColumnSums {
    float* parts;   // [N, column_parts(rows), width]
    void* sums[N];  // [width] each, of the weight's dtype
};

}  // namespace mllama::cuda
