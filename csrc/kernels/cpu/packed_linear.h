// Weights of a linear layer in the order in which a product with few rows reads them: memory speed
// is all that counts there, and one layout serves every instruction set.
//
// kLanes output rows lie side by side in a block, so that vector registers hold one sum per output
// row and no sum goes across lanes. A group holds kGroup inputs of every row, those after the last
// input as zeros; so do rows after the last one. A block is its groups in order, with a header
// before every `span` of them.
//
//   format      header, span          group
//   f32, f16    -                     [k][row]
//   bf16        -                     [k / 2][row][k % 2]
//   int8        -                     f16 scale[row], then s8 [k / 4][row][k % 4]
//   int4        f16 d[row], e[row]    u8 s[row], m[row], then codes of 4 bits; one span
//   q4_0, q5_0  -                     f16 scale[row], then codes of 4 or 5 bits
//   q4_1, q5_1  -                     f16 scale[row], f16 minimum[row], then codes
//   q4_k, q5_k  f16 d[row], e[row]    u8 s[row], m[row], then codes; 8 groups
//   q6_k        f16 d[row]            s8 s[row] of 16 inputs, of 16 more, then codes; 8 groups
//
// Codes are bytes [k / 8][row][k % 4] whose low half is of input k and whose high half of k + 4;
// then what 5 and 6 bits have beyond four. Fifth bits are bytes [row][k % 4], bit k / 4. The upper
// two of six are bytes [k / 16][row][k % 4], bits 2 * (k / 4 % 4) and the next.
//
// A weight is scale * code (int8), scale * (code - 8) (q4_0; 16 for q5_0), scale * code + minimum
// (q4_1, q5_1), d * s * code - e * m (int4, q4_k, q5_k) or d * s * (code - 32) (q6_k). int8 is
// GGUF's Q8_0; formats that begin with q hold the blocks of that name, exactly.
#pragma once

#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

constexpr int64_t kLanes = 16, kGroup = 32;

enum class Packing { f32, bf16, f16, int8, int4, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k };

constexpr int64_t kWholeRow = int64_t{1} << 30;  // groups; more than a row has
struct PackingSize {
    int64_t header, span, group;  // bytes of kLanes rows, groups, bytes of kLanes rows
    bool quantized;               // activations are quantized too
};
constexpr PackingSize kPackings[] = {
    {0, kWholeRow, 2048, false},  // f32
    {0, kWholeRow, 1024, false},  // bf16
    {0, kWholeRow, 1024, false},  // f16
    {0, kWholeRow, 544, true},    // int8
    {64, kWholeRow, 288, true},   // int4
    {0, kWholeRow, 288, true},    // q4_0
    {0, kWholeRow, 320, true},    // q4_1
    {0, kWholeRow, 352, true},    // q5_0
    {0, kWholeRow, 384, true},    // q5_1
    {64, 8, 288, true},           // q4_k
    {64, 8, 352, true},           // q5_k
    {32, 8, 416, true},           // q6_k
};
constexpr const PackingSize& size_of(Packing packing) {
    return kPackings[static_cast<int>(packing)];
}

// Of formats of codes: how many bits a code has, what is taken off it, whether its group's numbers
// are multiples of a header's, and whether a minimum is added.
constexpr int bits_of(Packing packing) {
    switch (packing) {
        case Packing::int8: return 8;
        case Packing::q6_k: return 6;
        case Packing::q5_0:
        case Packing::q5_1:
        case Packing::q5_k: return 5;
        default: return 4;
    }
}
constexpr int center_of(Packing packing) {
    switch (packing) {
        case Packing::q4_0: return 8;
        case Packing::q5_0: return 16;
        case Packing::q6_k: return 32;
        default: return 0;
    }
}
constexpr bool is_nested(Packing packing) {
    return packing == Packing::int4 || packing == Packing::q4_k || packing == Packing::q5_k;
}
constexpr bool has_minimum(Packing packing) {
    return packing != Packing::int8 && center_of(packing) == 0;
}

constexpr int64_t group_count(int64_t in) { return (in + kGroup - 1) / kGroup; }
constexpr int64_t block_count(int64_t out) { return (out + kLanes - 1) / kLanes; }
// Where the header of group g is in a block, and the group itself.
constexpr int64_t header_offset(const PackingSize& size, int64_t g) {
    return g / size.span * (size.header + size.span * size.group);
}
constexpr int64_t group_offset(const PackingSize& size, int64_t g) {
    return (g / size.span + 1) * size.header + g * size.group;
}
constexpr int64_t block_bytes(Packing packing, int64_t in) {
    int64_t groups = group_count(in), last = groups > 0 ? groups - 1 : 0;
    return group_offset(size_of(packing), last) + (groups - last) * size_of(packing).group;
}

// The rows of x as the product reads them: floats, or codes with a scale per group and the sums of
// the codes in either half of it. All are padded to whole groups.
struct Activations {
    float* values;  // [rows, groups * kGroup]
    int8_t* codes;  // [rows, groups * kGroup]
    float* scales;  // [rows, groups]
    int16_t* sums;  // [rows, groups, 2]
    float* totals;  // [rows, groups]: scale * sum of codes
};

// What a result passes through before it is stored.
enum class LinearActivation { none, gelu, gelu_tanh, quick_gelu };

// y = activation(x weight' + bias)
struct PackedLinear {
    Packing packing;
    Dtype dtype;  // of x and y
    int64_t rows, in, out;
    const void* x;  // [rows, in]
    Activations activations;
    const uint8_t* weight;
    const float* bias;  // [out] or null
    void* y;            // [rows, out]
    LinearActivation activation;
};

// Weights to blocks and back. Dense rows have all inputs, or, unpacked, those of some whole groups.
struct PackWeight {
    Packing packing;
    Dtype dtype;  // of the dense weight
    int64_t in, out;
    int64_t first, width;  // inputs [first, first + width)
    void* dense;           // [out, width]
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
