// Resizing of 8-bit RGB images in Pillow's arithmetic, one direction at a time, and the lookup
// that normalizes them.
#pragma once

#include <cstdint>

#include "simd/isa.h"

namespace mllama::kernels {

constexpr int kFractionBits = 22;  // of the weights, as in Pillow
constexpr int kLowBits = 12;       // a weight is high * 2^12 + low, both of 16 bits
constexpr int64_t kBlock =
    32;  // rows that resize_width takes at a time, columns that resize_height does

// One direction of a resize. Inputs are taken in pairs: pair q is the rows (or columns) 2q and 2q
// + 1. Result i is the sum over the pairs first[i] + k, k < count[i], of both inputs by their
// weights, in units of 2^-22, rounded, clipped to 8 bits.
struct Resize {
    int64_t most;          // pairs that any result has
    const int64_t* first;  // [results]
    const int32_t* count;  // [results]
    const int32_t* high;   // [results, most]: two 16-bit halves of weights each, that of the even
                           // input in the low bits
    const int32_t* low;
    int64_t in_height, in_width, height, width;  // equal in the other direction
    const uint8_t* in;                           // [in_height, in_width, 3]
    uint8_t* out;                                // [height, width, 3]
};

MLLAMA_KERNEL(void, resize_width, (const Resize& args, int64_t first_block, int64_t last_block))
MLLAMA_KERNEL(void, resize_height, (const Resize& args, int64_t first_block, int64_t last_block))

// planes[c * size + i] = table[c * 256 + pixels[i * 3 + c]] for i in [first, last).
MLLAMA_KERNEL(void, look_up,
              (const uint8_t* pixels, const float* table, float* planes, int64_t size,
               int64_t first, int64_t last))

}  // namespace mllama::kernels
