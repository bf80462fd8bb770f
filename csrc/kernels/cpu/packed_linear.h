// Weights of a linear layer in the order in which a product with few rows reads them: memory speed
// is all that counts there, and one layout serves every instruction set.
//
// kLanes output rows lie side by side in a block, so that vector registers hold one sum per output
// row and no sum goes across lanes. A block is [header][group 0][group 1] ..., a group holds kGroup
// inputs of every row, those after the last input as zeros; so do rows after the last one.
//
//   format  header                group
//   f32     -                     [k][row]
//   f16     -                     [k][row]
//   bf16    -                     [k / 2][row][k % 2]
//   int8    -                     f16 scale[row], then s8 [k / 4][row][k % 4]
//   int4    f16 d[row], e[row]    u8 s[row], m[row], then nibbles
//   q4_0    -                     f16 scale[row], then nibbles
//   q4_1    -                     f16 scale[row], f16 minimum[row], then nibbles
//
// Nibbles are bytes [k / 8][row][k % 4] whose low half is input k and whose high half is k + 4.
// A weight is scale * code (int8), d * s * code - e * m (int4), scale * (code - 8) (q4_0) or
// scale * code + minimum (q4_1); int8, q4_0 and q4_1 hold GGUF's Q8_0, Q4_0 and Q4_1 exactly.
#pragma once

#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

constexpr int64_t kLanes = 16, kGroup = 32;

enum class Packing { f32, bf16, f16, int8, int4, q4_0, q4_1 };

struct PackingSize {
    int64_t header, group;  // bytes of kLanes rows
    bool quantized;         // activations are quantized too
};
constexpr PackingSize kPackings[] = {
    {0, 2048, false},  // f32
    {0, 1024, false},  // bf16
    {0, 1024, false},  // f16
    {0, 544, true},    // int8
    {64, 288, true},   // int4
    {0, 288, true},    // q4_0
    {0, 320, true},    // q4_1
};
constexpr const PackingSize& size_of(Packing packing) {
    return kPackings[static_cast<int>(packing)];
}
constexpr int64_t group_count(int64_t in) { return (in + kGroup - 1) / kGroup; }
constexpr int64_t block_count(int64_t out) { return (out + kLanes - 1) / kLanes; }
constexpr int64_t block_bytes(Packing packing, int64_t in) {
    return size_of(packing).header + group_count(in) * size_of(packing).group;
}

// The rows of x as the product reads them: floats, or codes with a scale and the sum of the codes
// per group. All are padded to whole groups.
struct Activations {
    float* values;  // [rows, groups * kGroup]
    int8_t* codes;  // [rows, groups * kGroup]
    float* scales;  // [rows, groups]
    int32_t* sums;  // [rows, groups]
};

// y = x weight' + bias
struct PackedLinear {
    Packing packing;
    Dtype dtype;  // of x and y
    int64_t rows, in, out;
    const void* x;  // [rows, in]
    Activations activations;
    const uint8_t* weight;
    const float* bias;  // [out] or null
    void* y;            // [rows, out]
};

// Weights to blocks and back.
struct PackWeight {
    Packing packing;
    Dtype dtype;  // of the dense weight
    int64_t in, out;
    void* dense;  // [out, in]
    uint8_t* packed;
};

// a.activations of the rows [first, last)
MLLAMA_KERNEL(void, packed_activations, (const PackedLinear& a, int64_t first, int64_t last))
// The columns of y that the blocks [first, last) give.
MLLAMA_KERNEL(void, packed_product, (const PackedLinear& a, int64_t first, int64_t last))
// The blocks [first, last) from the dense weight. False where a value or a scale is not finite in
// the format.
MLLAMA_KERNEL(bool, pack_weight, (const PackWeight& a, int64_t first, int64_t last))
// The dense rows of the blocks [first, last); `dense` begins with the first one of them.
MLLAMA_KERNEL(void, unpack_blocks, (const PackWeight& a, int64_t first, int64_t last))
// One packed row into dense row `index`.
MLLAMA_KERNEL(void, unpack_row, (const PackWeight& a, int64_t row, int64_t index))

}  // namespace mllama::kernels
