// Cross entropy of rows of scores, and its gradient in their place.
#pragma once

#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

struct CrossEntropy {
    Dtype dtype;
    int64_t size;            // of the vocabulary
    void* scores;            // [rows, size]
    const int64_t* targets;  // [rows], of [0, size); others have neither loss nor gradient
    float softcap;           // scores are softcap * tanh(score / softcap); 0 = as they are
    // Where not 0, scores become this many times the gradient of their row's loss.
    float gradient;
    float* losses;  // [rows]
};

// The rows [first, last).
MLLAMA_KERNEL(void, cross_entropy, (const CrossEntropy& args, int64_t first, int64_t last))

}  // namespace mllama::kernels
