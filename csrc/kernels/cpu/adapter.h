// The low-rank update of a few rows, y += scale * (x a') b', as decoding adds it to a product: a
// and b are read as they lie, both by any number of threads.
#pragma once

#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

struct Adapter {
    int64_t rows, in, out, rank;
    float scale;
    Dtype a_dtype, b_dtype;
    const float* x;  // [rows, in]
    const void* a;   // [rank, in]
    const void* b;   // [out, rank]
    float* small;    // [rows, rank]
    float* y;        // [rows, out]
};

// small = scale * x a', the columns [first, last)
MLLAMA_KERNEL(void, adapter_down, (const Adapter& args, int64_t first, int64_t last))
// y += small b', the columns [first, last)
MLLAMA_KERNEL(void, adapter_up, (const Adapter& args, int64_t first, int64_t last))

}  // namespace mllama::kernels
