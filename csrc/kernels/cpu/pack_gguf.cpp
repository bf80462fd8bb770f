#include "kernels/cpu/pack_gguf.h"

#include <algorithm>

#include "kernels/cpu/packed_codes.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

constexpr int kGroups = 8;  // of a K-quant's block

// Where one block of one row goes.
struct Place {
    int64_t lane;
    uint8_t* header;
    uint8_t* group;  // the first of the block
    int64_t stride;  // from group to group
};

// Copies f16 number `index` of the block at p to the lanes at `to`. False if it is not finite.
bool put_f16(uint8_t* to, int64_t lane, const uint8_t* p, int64_t index) {
    std::memcpy(to + 2 * lane, p + 2 * index, 2);
    return std::isfinite(read_f16(p, index));
}

// Low halves of `count` bytes, then high halves.
void split_nibbles(const uint8_t* p, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) codes[i] = p[i] & 15, codes[count + i] = p[i] >> 4;
}

bool put_q8_0(const uint8_t* p, const Place& at) {
    put_bytes(at.group + 2 * kLanes, at.lane, p + 2);
    return put_f16(at.group, at.lane, p, 0);
}

// One or two f16 numbers, a bit each of the codes' fifth where there are five, then nibbles.
template <int kBits, int kNumbers>
bool put_simple(const uint8_t* p, const Place& at) {
    uint8_t codes[kGroup];
    bool finite = true;
    for (int i = 0; i < kNumbers; ++i) finite &= put_f16(at.group + 2 * kLanes * i, at.lane, p, i);
    const uint8_t* nibbles = p + 2 * kNumbers + (kBits == 5 ? 4 : 0);
    split_nibbles(nibbles, kGroup / 2, codes);
    if constexpr (kBits == 5) {
        uint32_t fifth = read_word(p + 2 * kNumbers);
        for (int k = 0; k < kGroup; ++k) codes[k] |= (fifth >> k & 1) << 4;
    }
    put_codes(at.group + 2 * kLanes * kNumbers, at.lane, kBits, codes);
    return finite;
}

// Scales and minima of 6 bits in 12 bytes: those of the first four groups in the low bits of a byte
// each, those of the others in halves of the last four bytes and the high bits of the first eight.
struct SixBits {
    explicit SixBits(const uint8_t* p) {
        for (int g = 0; g < 4; ++g) {
            scales[g] = p[g] & 63, minima[g] = p[4 + g] & 63;
            scales[4 + g] = (p[8 + g] & 15) | p[g] >> 6 << 4;
            minima[4 + g] = p[8 + g] >> 4 | p[4 + g] >> 6 << 4;
        }
    }
    uint8_t scales[kGroups], minima[kGroups];
};

// d and e, 12 bytes of scales, 32 bytes with a bit for each of 8 groups where codes have five, then
// for two groups each 32 bytes of nibbles.
template <int kBits>
bool put_nested(const uint8_t* p, const Place& at) {
    SixBits six(p + 4);
    const uint8_t *fifth = p + 16, *nibbles = fifth + (kBits == 5 ? 32 : 0);
    uint8_t codes[kGroups * kGroup];
    for (int g = 0; g < kGroups; g += 2)
        split_nibbles(nibbles + g * kGroup / 2, kGroup, codes + g * kGroup);
    for (int g = 0; g < kGroups; ++g) {
        uint8_t *group = at.group + g * at.stride, *own = codes + g * kGroup;
        if constexpr (kBits == 5) {
            for (int k = 0; k < kGroup; ++k) own[k] |= (fifth[k] >> g & 1) << 4;
        }
        group[at.lane] = six.scales[g];
        group[kLanes + at.lane] = six.minima[g];
        put_codes(group + 2 * kLanes, at.lane, kBits, own);
    }
    bool finite = put_f16(at.header, at.lane, p, 0);
    return put_f16(at.header + 2 * kLanes, at.lane, p, 1) && finite;
}

// For four groups each 64 bytes of nibbles; then 32 bytes of their upper bits; 16 scales; d.
bool put_q6_k(const uint8_t* p, const Place& at) {
    const uint8_t *upper = p + 128, *scales = p + 192;
    uint8_t codes[kGroups * kGroup];
    for (int g = 0; g < kGroups; g += 4)
        split_nibbles(p + g * kGroup / 2, 2 * kGroup, codes + g * kGroup);
    for (int g = 0; g < kGroups; ++g) {
        uint8_t *group = at.group + g * at.stride, *own = codes + g * kGroup;
        for (int k = 0; k < kGroup; ++k)
            own[k] |= (upper[g / 4 * kGroup + k] >> 2 * (g % 4) & 3) << 4;
        group[at.lane] = scales[2 * g];
        group[kLanes + at.lane] = scales[2 * g + 1];
        put_codes(group + 2 * kLanes, at.lane, 6, own);
    }
    return put_f16(at.header, at.lane, p, 104);
}

bool put_block(Packing packing, const uint8_t* p, const Place& at) {
    switch (packing) {
        case Packing::int8: return put_q8_0(p, at);
        case Packing::q4_0: return put_simple<4, 1>(p, at);
        case Packing::q4_1: return put_simple<4, 2>(p, at);
        case Packing::q5_0: return put_simple<5, 1>(p, at);
        case Packing::q5_1: return put_simple<5, 2>(p, at);
        case Packing::q4_k: return put_nested<4>(p, at);
        case Packing::q5_k: return put_nested<5>(p, at);
        case Packing::q6_k: return put_q6_k(p, at);
        default: return false;
    }
}

}  // namespace

bool pack_gguf(const PackGguf& a, int64_t first, int64_t last) {
    GgufBlock block = gguf_block(a.packing);
    const PackingSize& size = size_of(a.packing);
    int64_t blocks = a.in / block.inputs, bytes = block_bytes(a.packing, a.in);
    bool finite = true;
    for (int64_t row = first * kLanes; row < std::min(last * kLanes, a.out); ++row) {
        uint8_t* start = a.packed + row / kLanes * bytes;
        for (int64_t i = 0; i < blocks; ++i) {
            int64_t g = i * block.inputs / kGroup;
            Place at{row % kLanes, start + header_offset(size, g), start + group_offset(size, g),
                     size.group};
            finite &= put_block(a.packing, a.blocks + (row * blocks + i) * block.bytes, at);
        }
    }
    return finite;
}

}  // namespace mllama::kernels::MLLAMA_ISA
