// What code made by scripts/ptx2cpp.py uses: registers are unsigned integers, addresses in shared
// memory are 32 bits, a variable's number and a place in it.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "emulator/cuda.h"
#include "emulator/half.h"
#include "emulator/scheduler.h"

namespace mllama::emulator {

// A parameter of a kernel that is a struct. Up to 16 bytes the caller passes it in registers, as
// this is passed if its members are integers and pointers.
template <int N>
struct alignas(8) Bytes {
    unsigned char bytes[N];
};

// ---- registers

template <class T, class Register>
T as(Register r) {
    if constexpr (sizeof(T) == sizeof(Register)) return std::bit_cast<T>(r);
    return static_cast<T>(r);
}
template <class Register, class T>
void put(Register& r, T value) {
    if constexpr (sizeof(T) == sizeof(Register)) {
        r = std::bit_cast<Register>(value);
    } else {
        r = static_cast<Register>(value);
    }
}

// ---- memory

constexpr int kVariables = 16, kVariableBits = 20;

inline unsigned char* shared_variable(const void* place, size_t bytes, size_t align,
                                      const char* name) {
    return static_cast<unsigned char*>(bytes ? shared_memory(place, bytes, align, name)
                                             : dynamic_shared_memory());
}
inline unsigned char* shared(uint32_t at, unsigned char* const (&variables)[kVariables]) {
    uint32_t variable = at >> kVariableBits;
    if (variable >= kVariables) return variables[0] + static_cast<int32_t>(at);
    return variables[variable] + (at & ((1u << kVariableBits) - 1));
}
inline uint64_t address_of_shared(uint64_t at, unsigned char* const (&variables)[kVariables]) {
    return reinterpret_cast<uint64_t>(shared(static_cast<uint32_t>(at), variables));
}
inline uint64_t shared_offset(uint64_t address, unsigned char* const (&variables)[kVariables]) {
    for (uint64_t i = kVariables; i-- > 0;) {
        auto begin = reinterpret_cast<uint64_t>(variables[i]);
        if (begin && begin <= address && address - begin < 1u << kVariableBits)
            return (i << kVariableBits) + (address - begin);
    }
    stop("an address that is not in shared memory");
}
template <class T>
uint64_t address_of(const T& variable) {
    return reinterpret_cast<uint64_t>(&variable);
}
inline unsigned char* pointer(uint64_t address) {
    return reinterpret_cast<unsigned char*>(address);
}
template <class T>
T fetch(const unsigned char* at, int i) {
    T value;
    std::memcpy(&value, at + i * sizeof(T), sizeof(T));
    return value;
}
template <class T>
void keep(unsigned char* at, int i, T value) {
    std::memcpy(at + i * sizeof(T), &value, sizeof(T));
}

// ---- arithmetic

inline uint16_t bits_of_bf16(float v) { return to_bf16(v).bits; }
inline uint16_t bits_of_f16(float v) { return to_f16(v).bits; }
inline float from_bf16(uint16_t bits) { return to_float(bf16{bits}); }
inline float from_f16(uint16_t bits) { return to_float(f16{bits}); }

template <class T>
T shifted_left(T v, uint32_t by) {
    return by < 8 * sizeof(T) ? static_cast<T>(std::make_unsigned_t<T>(v) << by) : T{0};
}
template <class T>
T shifted_right(T v, uint32_t by) {
    constexpr uint32_t kBits = 8 * sizeof(T);
    return by < kBits ? static_cast<T>(v >> by) : static_cast<T>(v < 0 ? -1 : 0);
}
template <class T>
T high_product(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (8 * sizeof(T)));
}
inline float saturated(float v) { return v > 0 ? std::min(v, 1.0f) : 0.0f; }
// Rounded to zero, within the type's range.
template <class T, class Float>
T truncated(Float v) {
    using Limits = std::numeric_limits<T>;
    if (v != v) return 0;
    if (v >= static_cast<Float>(Limits::max())) return Limits::max();
    if (v <= static_cast<Float>(Limits::min())) return Limits::min();
    return static_cast<T>(v);
}
// a * b + c, rounded down.
inline float fma_down(float a, float b, float c) {
    double exact = static_cast<double>(a) * b + c;
    auto near = static_cast<float>(exact);
    return near > exact ? std::nextafter(near, -std::numeric_limits<float>::infinity()) : near;
}
inline float without_subnormals(float v) {
    return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v;
}
inline float ptx_ex2(float v) { return without_subnormals(std::exp2(without_subnormals(v))); }
inline float ptx_lg2(float v) { return std::log2(v); }
inline float ptx_rcp(float v) { return 1.0f / v; }
inline float ptx_sqrt(float v) { return std::sqrt(v); }
inline float ptx_rsqrt(float v) { return 1.0f / std::sqrt(v); }

// `count` bits of `into`, from place `at` on, become the lowest ones of `bits`.
template <class T>
T ptx_bfi(T bits, T into, uint32_t at, uint32_t count) {
    T ones = count < 8 * sizeof(T) ? (T{1} << count) - 1 : ~T{0};
    return at < 8 * sizeof(T) ? (into & ~(ones << at)) | (bits & ones) << at : into;
}
template <class T>
T ptx_bfe(T bits, uint32_t at, uint32_t count) {
    static_assert(std::is_unsigned_v<T>);
    T ones = count < 8 * sizeof(T) ? (T{1} << count) - 1 : ~T{0};
    return at < 8 * sizeof(T) ? bits >> at & ones : T{0};
}
// Four bytes out of eight, a's and then b's; with 8 added to a choice its sign bit fills the byte.
inline uint32_t ptx_prmt(uint32_t a, uint32_t b, uint32_t choices) {
    uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        uint32_t choice = choices >> 4 * i & 15, byte = bytes >> 8 * (choice & 7) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}

// ---- warps: `clamp` has 32 less the width of groups in bits 8 to 12

inline int group_width(uint32_t clamp) { return static_cast<int>(32 - (clamp >> 8 & 31)); }
inline uint32_t shuffle_idx(uint32_t mask, uint32_t value, uint32_t source, uint32_t clamp) {
    return __shfl_sync(mask, value, static_cast<int>(source), group_width(clamp));
}
inline uint32_t shuffle_up(uint32_t mask, uint32_t value, uint32_t delta, uint32_t clamp) {
    return __shfl_up_sync(mask, value, static_cast<int>(delta), group_width(clamp));
}
inline uint32_t shuffle_down(uint32_t mask, uint32_t value, uint32_t delta, uint32_t clamp) {
    return __shfl_down_sync(mask, value, static_cast<int>(delta), group_width(clamp));
}
inline uint32_t shuffle_bfly(uint32_t mask, uint32_t value, uint32_t bits, uint32_t clamp) {
    return __shfl_xor_sync(mask, value, static_cast<int>(bits), group_width(clamp));
}
inline uint32_t vote_ballot(uint32_t mask, bool predicate) {
    return __ballot_sync(mask, predicate);
}
inline bool vote_any(uint32_t mask, bool predicate) { return __any_sync(mask, predicate); }
inline bool vote_all(uint32_t mask, bool predicate) { return __all_sync(mask, predicate); }

}  // namespace mllama::emulator
