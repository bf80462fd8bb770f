// Resizing of 8-bit RGB images in Pillow's arithmetic, one direction at a time, and the lookup
// that normalizes them.
#pragma once

#include <cstdint>

#include "simd/isa.h"

namespace mllama::kernels {

constexpr int kFractionBits = 22;  // of the weights, as in Pillow
constexpr int kLowBits = 12;       // a weight is high * 2^12 + low, both of 16 bits
constexpr int64_t kBlock = 32;     // rows that resize_width takes at a time

// One direction of a resize. Inputs are taken in pairs: pair q is the rows (or columns) 2q and 2q
// + 1. Result i is the sum over the pairs first[i] + k, k < count[i], of both inputs by their
// weights, in units of 2^-22, rounded, clipped to 8 bits. Neither the first nor the last pair of a
// result is before that of the result before.
struct Resize {
    int64_t most;          // pairs that any result has
    const int64_t* first;  // [results]
    const int32_t* count;  // [results]
    const int32_t* high;   // [results, most]: two 16-bit halves of weights each, that of the even
                           // input in the low bits
    const int32_t* low;
};

// in [rows, in_width, 3] to out [rows, width, 3].
MLLAMA_KERNEL(void, resize_width,
              (const Resize& columns, const uint8_t* in, int64_t rows, int64_t in_width,
               uint8_t* out, int64_t width))

// The results first ... last - 1 of `rows`, out [last - first, width, 3]. `in` [..., width, 3] has
// the rows from 2 * first_pair on, and ends at in_height where its last pair has one row.
MLLAMA_KERNEL(void, resize_height,
              (const Resize& rows, const uint8_t* in, int64_t first_pair, int64_t in_height,
               int64_t width, uint8_t* out, int64_t first, int64_t last))

// planes[c * size + i] = table[c * 256 + pixels[i * 3 + c]] for i < count.
MLLAMA_KERNEL(void, look_up,
              (const uint8_t* pixels, const float* table, float* planes, int64_t size,
               int64_t count))

}  // namespace mllama::kernels
