// Blocks of a GGUF file in the layout of packed_linear.h, bit for bit.
#pragma once

#include "kernels/cpu/packed_linear.h"

namespace mllama::kernels {

struct GgufBlock {
    int64_t inputs, bytes;  // of a row
};
// The block that a format holds; none for those that are not GGUF's.
constexpr GgufBlock gguf_block(Packing packing) {
    switch (packing) {
        case Packing::int8: return {32, 34};
        case Packing::q4_0: return {32, 18};
        case Packing::q4_1: return {32, 20};
        case Packing::q5_0: return {32, 22};
        case Packing::q5_1: return {32, 24};
        case Packing::q4_k: return {256, 144};
        case Packing::q5_k: return {256, 176};
        case Packing::q6_k: return {256, 210};
        default: return {0, 0};
    }
}

struct PackGguf {
    Packing packing;
    int64_t in, out;        // in: whole blocks
    const uint8_t* blocks;  // [out, in / block.inputs * block.bytes]
    uint8_t* packed;
};

// The blocks of kLanes rows [first, last). False where a scale is not finite.
MLLAMA_KERNEL(bool, pack_gguf, (const PackGguf& a, int64_t first, int64_t last))

}  // namespace mllama::kernels
