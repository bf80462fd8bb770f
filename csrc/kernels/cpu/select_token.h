// The next token of a row of logits: the likeliest one, or one drawn by a uniform number from what
// temperature, top-k, top-p and min-p leave, in this order.
#pragma once

#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

struct SelectToken {
    Dtype dtype;
    int64_t size;           // of the vocabulary
    const void* logits;     // [rows, size]
    const bool* present;    // [rows, size], tokens with a repetition penalty; null = none
    const double* uniform;  // [rows], in [0, 1); null = the likeliest token
    float penalty, temperature;
    int64_t top_k;  // 0 = all
    double top_p;
    float min_p;
    int64_t* tokens;  // [rows]; -1 where the scores are not a distribution
};

// The rows [first, last). floats and indices: scratch, each 2 * size.
MLLAMA_KERNEL(void, select_token,
              (const SelectToken& args, float* floats, int32_t* indices, int64_t first,
               int64_t last))

}  // namespace mllama::kernels
