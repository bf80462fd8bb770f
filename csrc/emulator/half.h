// The 16-bit types as numbers, rounded as the device's conversions round.
#pragma once

#include <bit>

#include "simd/types.h"

namespace mllama::emulator {

inline float to_float(bf16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(f16 v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }

inline bf16 to_bf16(float v) {
    auto bits = std::bit_cast<uint32_t>(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // the device has one NaN
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline f16 to_f16(float v) {
    if (v != v) return {0x7fff};
    return {std::bit_cast<uint16_t>(static_cast<_Float16>(v))};
}

}  // namespace mllama::emulator
