// Resizing of 8-bit RGB pictures in Pillow's arithmetic, one direction at a time, and the lookup that normalises them.
#pragma once

#include <cstdint>

#include "simd/isa.h"

namespace mllama::kernels {

constexpr int kFractionBits = 22;   // of the weights, as in Pillow
constexpr int64_t kBlockRows = 32;  // rows that resize_width takes at a time

// One direction of a resize. Result i is the sum of weights[i * taps + k] * input[first[i] + k] over k < count[i], in
// units of 2^-22, rounded and clipped to 8 bits.
struct Resize {
    int64_t taps;  // the most any result has
    const int64_t* first;
    const int32_t* count;
    const int32_t* weights;
    int64_t in_height, in_width, height, width;  // equal in the direction that stays
    const uint8_t* in;                           // [in_height, in_width, 3]
    uint8_t* out;                                // [height, width, 3]
};

MLLAMA_KERNEL(void, resize_width, (const Resize& args, int64_t first_block, int64_t last_block))
MLLAMA_KERNEL(void, resize_height, (const Resize& args, int64_t first_row, int64_t last_row))

// plane[c * size + i] = table[c * 256 + pixels[i * 3 + c]] for i in [first, last).
MLLAMA_KERNEL(void, look_up,
              (const uint8_t* pixels, const float* table, float* planes, int64_t size, int64_t first, int64_t last))

}  // namespace mllama::kernels
