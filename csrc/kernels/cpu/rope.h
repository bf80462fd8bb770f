// Rotary position embedding, half-split: in every head (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1
// sin) for its two halves.
#pragma once

#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

// Queries or keys: [batch, tokens, heads, 2 half], strides in elements, the last one 1. The result
// is contiguous.
struct RopeHeads {
    const void* x;
    void* y;
    int64_t heads;
    int64_t batch_stride;
    int64_t token_stride;
    int64_t head_stride;
};

struct Rope {
    Dtype dtype;
    int64_t tokens;  // of one batch row
    int64_t half;    // half of a head's size
    float sign;      // of the sine: -1 rotates back
    RopeHeads q;
    RopeHeads k;
    const float* cos;  // [1 or batch, tokens, half]
    const float* sin;
    int64_t cos_batch_stride;  // 0 if all batch rows share the table
    int64_t sin_batch_stride;
};

// The tokens [first, last), counted through the batch.
MLLAMA_KERNEL(void, rope, (const Rope& args, int64_t first, int64_t last))

}  // namespace mllama::kernels
