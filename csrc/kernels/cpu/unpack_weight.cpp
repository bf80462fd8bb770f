#include <algorithm>

#include "kernels/cpu/packed_linear.h"
#include "kernels/cpu/tiles.h"
#include "simd/bytes.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

// Code k of the lanes: a signed byte, or 4 to 6 bits.
vf lanes_int8(const uint8_t* codes, int lane, int k) {
    vi words = reinterpret_cast<vi>(load_bits(codes + (k / 4 * kLanes + lane) * 4));
    return to_float(words << (24 - 8 * (k % 4)) >> 24);
}
template <int kBits>
vf lanes_code(const uint8_t* codes, int lane, int k) {
    constexpr int kMore = kBits - 4, kNibbles = kGroup / 2 * kLanes;
    vu words = load_bits(codes + (k / 8 * kLanes + lane) * 4);
    vu code = (words >> (8 * (k % 4) + k % 8 / 4 * 4)) & 15u;
    if constexpr (kMore > 0) {
        constexpr int kSteps = 8 / kMore;  // codes in a byte
        vu upper = load_bits(codes + kNibbles + (k / 4 / kSteps * kLanes + lane) * 4);
        code |= ((upper >> (8 * (k % 4) + k / 4 % kSteps * kMore)) & ((1u << kMore) - 1)) << 4;
    }
    return to_float(reinterpret_cast<vi>(code));
}

template <int kBits>  // int4, q4_k, q5_k
vf lanes_nested(const uint8_t* header, const uint8_t* p, int lane, int k) {
    return lanes_f16(header + 2 * lane) * lanes_u8(p + lane) *
               lanes_code<kBits>(p + 2 * kLanes, lane, k) -
           lanes_f16(header + 2 * kLanes + 2 * lane) * lanes_u8(p + kLanes + lane);
}
template <int kBits>  // q4_0, q5_0
vf lanes_centered(const uint8_t* p, int lane, int k) {
    constexpr float kCenter = 1 << (kBits - 1);
    return lanes_f16(p + 2 * lane) * (lanes_code<kBits>(p + 2 * kLanes, lane, k) - kCenter);
}
template <int kBits>  // q4_1, q5_1
vf lanes_shifted(const uint8_t* p, int lane, int k) {
    return lanes_f16(p + 2 * lane) * lanes_code<kBits>(p + 4 * kLanes, lane, k) +
           lanes_f16(p + 2 * kLanes + 2 * lane);
}

// The weights of input k of the group at p, for kWidth rows from `lane` on.
vf lanes_at(Packing packing, const uint8_t* header, const uint8_t* p, int lane, int k) {
    switch (packing) {
        case Packing::f32: return load(reinterpret_cast<const float*>(p) + k * kLanes + lane);
        case Packing::f16: return load(reinterpret_cast<const f16*>(p) + k * kLanes + lane);
        case Packing::bf16: {
            vu pair = load_bits(p + (k / 2 * kLanes + lane) * 4);
            return as_float(k % 2 ? pair & 0xffff0000u : pair << 16);
        }
        case Packing::int8: return lanes_f16(p + 2 * lane) * lanes_int8(p + 2 * kLanes, lane, k);
        case Packing::int4:
        case Packing::q4_k: return lanes_nested<4>(header, p, lane, k);
        case Packing::q5_k: return lanes_nested<5>(header, p, lane, k);
        case Packing::q4_0: return lanes_centered<4>(p, lane, k);
        case Packing::q5_0: return lanes_centered<5>(p, lane, k);
        case Packing::q4_1: return lanes_shifted<4>(p, lane, k);
        case Packing::q5_1: return lanes_shifted<5>(p, lane, k);
        case Packing::q6_k:
            return lanes_f16(header + 2 * lane) * lanes_s8(p + k / 16 * kLanes + lane) *
                   (lanes_code<6>(p + 2 * kLanes, lane, k) - 32.0f);
    }
    return vf{};
}

// Group g of a block: tile[k][lane].
void unpack_group(const PackWeight& a, int64_t block, int64_t g, float* tile) {
    const PackingSize& size = size_of(a.packing);
    const uint8_t* start = a.packed + block * block_bytes(a.packing, a.in);
    const uint8_t *header = start + header_offset(size, g), *p = start + group_offset(size, g);
    for (int k = 0; k < kGroup; ++k) {
        for (int lane = 0; lane < kLanes; lane += kWidth)
            store(tile + k * kLanes + lane, lanes_at(a.packing, header, p, lane, k));
    }
}

// Inputs of group g of a dense row.
void write_inputs(const PackWeight& a, int64_t index, int64_t g, const float* values) {
    dispatch(a.dtype, [&](auto t) {
        auto* to = static_cast<decltype(t)*>(a.dense) + index * a.in + g * kGroup;
        for_vectors(std::min(kGroup, a.in - g * kGroup),
                    [&](int64_t i, int n) { put(to + i, at(values + i, n), n); });
    });
}

}  // namespace

void unpack_blocks(const PackWeight& a, int64_t first, int64_t last) {
    float tile[kGroup * kLanes], rows[kLanes * kGroup];
    for (int64_t block = first; block < last; ++block) {
        int64_t row = (block - first) * kLanes, count = std::min(kLanes, a.out - block * kLanes);
        for (int64_t g = 0; g < group_count(a.in); ++g) {
            unpack_group(a, block, g, tile);
            transpose(as_words(tile), kLanes, as_words(rows), kGroup, kGroup, kLanes);
            for (int64_t lane = 0; lane < count; ++lane)
                write_inputs(a, row + lane, g, rows + lane * kGroup);
        }
    }
}

void unpack_row(const PackWeight& a, int64_t row, int64_t index) {
    float tile[kGroup * kLanes], values[kGroup];
    for (int64_t g = 0; g < group_count(a.in); ++g) {
        unpack_group(a, row / kLanes, g, tile);
        for (int64_t k = 0; k < kGroup; ++k) values[k] = tile[k * kLanes + row % kLanes];
        write_inputs(a, index, g, values);
    }
}

}  // namespace mllama::kernels::MLLAMA_ISA
