// Launchers of what resizes 8-bit RGB images in Pillow's arithmetic, one direction at a time.
#pragma once

#include <cstdint>

#include "kernels/cuda/stream.h"

namespace mllama::cuda {

// One direction: [outer, in_size, inner] to [outer, out_size, inner], bytes. Result i is the sum
// of count[i] inputs from first[i] on by their weights, in units of 2^-22, rounded and clipped.
struct ResizeAxis {
    const uint8_t* in;
    uint8_t* out;
    int64_t outer, in_size, out_size, inner;
    const int32_t* first;   // [out_size]
    const int32_t* count;   // [out_size]
    const int32_t* weight;  // [out_size, most]
    int64_t most;
};
void resize_axis(const ResizeAxis& args, Stream stream);

// planes[c * size + i] = table[pixels[i * 3 + c] * 3 + c] for i < size.
void look_up(const uint8_t* pixels, const float* table, float* planes, int64_t size, Stream stream);

}  // namespace mllama::cuda
