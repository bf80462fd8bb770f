// Rows of a quantized key-value cache: `size` signed 8-bit codes, then a bf16 scale for every
// kRowGroup of them. A value is scale * code. bf16 has f32's range, and codes are computed with the
// rounded scale, so that its few bits cost nothing.
#pragma once

#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

constexpr int64_t kRowGroup = 32;
constexpr int64_t quantized_row_bytes(int64_t size) {
    return size + 2 * ((size + kRowGroup - 1) / kRowGroup);
}

// x: [rows, size] of a dtype; codes: [rows, quantized_row_bytes]. A group with a value that is not
// finite becomes NaN.
MLLAMA_KERNEL(void, quantize_rows,
              (const void* x, Dtype dtype, int8_t* codes, int64_t rows, int64_t size))
MLLAMA_KERNEL(void, dequantize_rows,
              (const int8_t* codes, void* x, Dtype dtype, int64_t rows, int64_t size))

}  // namespace mllama::kernels
