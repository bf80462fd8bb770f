// Codes of one row in the bytes of a group that packed_linear.h describes.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/cpu/packed_linear.h"
#include "simd/vec.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

inline uint32_t read_word(const uint8_t* p) {
    uint32_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}
inline void write_word(uint8_t* p, uint32_t word) { std::memcpy(p, &word, sizeof word); }

// Signed bytes.
inline void put_bytes(uint8_t* p, int64_t lane, const uint8_t* codes) {
    for (int64_t k = 0; k < kGroup; k += 4)
        write_word(p + (k / 4 * kLanes + lane) * 4, read_word(codes + k));
}

// Codes of 4 to 6 bits, four to a word.
inline void put_codes(uint8_t* p, int64_t lane, int bits, const uint8_t* codes) {
    for (int64_t j = 0; j < kGroup / 8; ++j) {
        uint32_t low = read_word(codes + 8 * j), high = read_word(codes + 8 * j + 4);
        write_word(p + (j * kLanes + lane) * 4, (low & 0x0f0f0f0fu) | (high & 0x0f0f0f0fu) << 4);
    }
    int more = bits - 4, steps = more ? 8 / more : 0;
    for (int64_t w = 0; w < more; ++w) {
        uint32_t word = 0, mask = 0x01010101u * ((1u << more) - 1);
        for (int t = 0; t < steps; ++t)
            word |= (read_word(codes + 4 * (w * steps + t)) >> 4 & mask) << (t * more);
        write_word(p + kGroup / 2 * kLanes + (w * kLanes + lane) * 4, word);
    }
}

// ---- f16 numbers

inline float read_f16(const uint8_t* p, int64_t i) {
    return load_n(reinterpret_cast<const f16*>(p) + i, 1)[0];
}
inline void write_f16(uint8_t* p, int64_t i, float x) {
    store_n(reinterpret_cast<f16*>(p) + i, splat(x), 1);
}

}  // namespace
}  // namespace mllama::kernels::MLLAMA_ISA
