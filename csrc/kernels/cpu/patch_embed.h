// Images to rows of patches and back: what turns patch embedding into a matrix product.
#pragma once

#include <cstdint>

#include "simd/isa.h"

namespace mllama::kernels {

struct Patches {
    int64_t element;  // bytes of one
    int64_t channels;
    int64_t rows;  // of patches in an image
    int64_t columns;
    int64_t size;          // of a patch's side, in pixels
    int64_t batch_stride;  // of the pixels, in elements; along a line it is 1
    int64_t channel_stride;
    int64_t line_stride;
    char* pixels;   // [batch, channels, rows * size, columns * size]
    char* patches;  // [batch * rows * columns, channels * size * size], dense
};

// The patches [first, last), counted through the batch: copied from the pixels, or back to them.
MLLAMA_KERNEL(void, cut_patches, (const Patches& args, int64_t first, int64_t last))
MLLAMA_KERNEL(void, paste_patches, (const Patches& args, int64_t first, int64_t last))

}  // namespace mllama::kernels
