// The three products of a low-rank update, between rows x [rows, width], a factor of low rank and
// small [rows, rank], whose rows are `stride` apart: each is computed from the other two. Dropout
// drops the same elements of x in all three.
#pragma once

#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

struct LowRank {
    int64_t rows;
    int64_t width;
    int64_t rank;
    int64_t stride;  // of small
    Dtype dtype;     // of x
    Dtype factor_dtype;
    bool by_column;  // the factor is [width, rank], as B is, instead of [rank, width], as A is
    float scale;
    bool dropout;
    uint32_t threshold;  // elements with a hash below it are dropped
    int64_t seed;
    void* x;       // [rows, width]
    void* factor;  // [rank, width] or [width, rank]
    float* small;  // [rows, rank]
};

// Units of work for threads: blocks of rows, blocks of columns, or both, then in the order [column
// block][row block]. Results do not depend on which thread computes which block.
constexpr int64_t kRowBlock = 32, kUpColumns = 384, kOuterColumns = 192;

// small = scale * dropout(x) factor', for the row blocks [first, last)
MLLAMA_KERNEL(void, low_rank_down, (const LowRank& args, int64_t first, int64_t last))
// x += dropout(scale * small factor), for the blocks [first, last) of kUpColumns columns and
// kRowBlock rows
MLLAMA_KERNEL(void, low_rank_up, (const LowRank& args, int64_t first, int64_t last))
// factor = scale * small' dropout(x), for the blocks [first, last) of kOuterColumns columns
MLLAMA_KERNEL(void, low_rank_outer, (const LowRank& args, int64_t first, int64_t last))

}  // namespace mllama::kernels
