// One thin vector type for all kernels, on GCC's vector extensions: `vf` holds kWidth floats (4, 8
// or 16 by instruction set); + - * / and comparisons with ?: come from the compiler, a * b + c
// becomes an FMA. Memory may hold f32, bf16 or f16: loads widen to f32, stores round to nearest
// even. The `_n` variants handle the tail of a row.
//
// Included by kernels only, once per instruction set: everything lives in that set's namespace.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd/types.h"

namespace mllama::simd::MLLAMA_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));

// The intrinsics can take x from memory within the instruction that uses it; GCC 12 moves it
// through two others.
#if defined(__AVX512F__)
inline vf splat(float x) { return reinterpret_cast<vf>(_mm512_set1_ps(x)); }
#elif defined(__AVX2__)
inline vf splat(float x) { return reinterpret_cast<vf>(_mm256_set1_ps(x)); }
#else
inline vf splat(float x) { return vf{} + x; }
#endif
inline vu as_bits(vf x) { return reinterpret_cast<vu>(x); }
inline vf as_float(vu x) { return reinterpret_cast<vf>(x); }
inline vf as_float(vi x) { return reinterpret_cast<vf>(x); }
// b where one of them is NaN, in the instruction as in the expression.
#if defined(__AVX512F__)
inline vf max(vf a, vf b) {
    return reinterpret_cast<vf>(
        _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
inline vf min(vf a, vf b) {
    return reinterpret_cast<vf>(
        _mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#elif defined(__AVX2__)
inline vf max(vf a, vf b) {
    return reinterpret_cast<vf>(
        _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
inline vf min(vf a, vf b) {
    return reinterpret_cast<vf>(
        _mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
#else
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }
#endif

// ---- conversions

// 16-bit lanes to 32 and back. GCC 12 makes five instructions of __builtin_convertvector where one
// will do.
inline vu extend(vh h) {
#if defined(__AVX512F__)
    return reinterpret_cast<vu>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)));
#elif defined(__AVX2__)
    return reinterpret_cast<vu>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
#else
    return __builtin_convertvector(h, vu);
#endif
}
inline vh truncate(vu bits) {
#if defined(__AVX512F__)
    return reinterpret_cast<vh>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
#else
    return __builtin_convertvector(bits, vh);
#endif
}

inline vf widen(vh h, bf16) { return as_float(extend(h) << 16); }

inline vh narrow(vf x, bf16) {
    vu bits = as_bits(x);
#if defined(__AVX512BF16__)
    // One instruction, but it takes subnormals for zero: where there are any (or zeros), the long
    // way.
    if (!_mm512_testn_epi32_mask(reinterpret_cast<__m512i>(bits), _mm512_set1_epi32(0x7f800000)))
        [[likely]] {
        return reinterpret_cast<vh>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
    }
#endif
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vu quiet = (bits >> 16) | 0x40u;  // a NaN stays a NaN: rounding could carry it into infinity
    return truncate(x != x ? quiet : rounded);
}

#if defined(__AVX512F__)
inline vf widen(vh h, f16) {
    return reinterpret_cast<vf>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(h)));
}
inline vh narrow(vf x, f16) {
    return reinterpret_cast<vh>(
        _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline vf widen(vh h, f16) {
    return reinterpret_cast<vf>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
}
inline vh narrow(vf x, f16) {
    return reinterpret_cast<vh>(
        _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline vf widen(vh h, f16) {
    vu bits = __builtin_convertvector(h, vu);
    vu sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    // Shifting exponent and mantissa into place leaves the exponent 112 too small; the product with
    // 2^112 mends it, subnormals included. Infinity and NaN get the full exponent.
    vf value = as_float(magnitude << 13) * 0x1p112f;
    vu special = (magnitude << 13) | 0x7f800000u;
    return as_float((magnitude >= 0x7c00u ? special : as_bits(value)) | sign);
}
inline vh narrow(vf x, f16) {
    vu bits = as_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    vu subnormal = as_bits(as_float(magnitude) + 0.5f) -
                   as_bits(splat(0.5f));  // f32's last bit at 0.5 is f16's 2^-24
    vu result = magnitude < (113u << 23) ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? vu{} + 0x7c00u : result;  // rounds past 65504
    result = magnitude > 0x7f800000u ? vu{} + 0x7e00u : result;
    return __builtin_convertvector(result | sign, vh);
}
#endif

// x as it would be after a store to T and a load back: where the reference rounds between two
// steps.
inline vf rounded(vf x, float) { return x; }
template <class Half>
inline vf rounded(vf x, Half) {
    return widen(narrow(x, Half{}), Half{});
}

// ---- memory

inline vf load(const float* p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
#if defined(__AVX512F__)  // masked moves: one instruction where memcpy of a varying size is a call
inline __mmask16 first_n(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline vf load_n(const float* p, int64_t n) {
    return reinterpret_cast<vf>(_mm512_maskz_loadu_ps(first_n(n), p));
}
inline void store_n(float* p, vf x, int64_t n) {
    _mm512_mask_storeu_ps(p, first_n(n), reinterpret_cast<__m512>(x));
}
inline vh load_half_n(const void* p, int64_t n) {
    return reinterpret_cast<vh>(_mm256_maskz_loadu_epi16(first_n(n), p));
}
inline void store_half_n(void* p, vh h, int64_t n) {
    _mm256_mask_storeu_epi16(p, first_n(n), reinterpret_cast<__m256i>(h));
}
#else
inline vf load_n(const float* p, int64_t n) {
    vf x{};
    std::memcpy(&x, p, n * sizeof(float));
    return x;
}
inline void store_n(float* p, vf x, int64_t n) { std::memcpy(p, &x, n * sizeof(float)); }
inline vh load_half_n(const void* p, int64_t n) {
    vh h{};
    std::memcpy(&h, p, n * sizeof(uint16_t));
    return h;
}
inline void store_half_n(void* p, vh h, int64_t n) { std::memcpy(p, &h, n * sizeof(uint16_t)); }
#endif

template <class Half>  // bf16 or f16
inline vf load(const Half* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return widen(h, Half{});
}
template <class Half>
inline void store(Half* p, vf x) {
    vh h = narrow(x, Half{});
    std::memcpy(p, &h, sizeof h);
}
template <class Half>
inline vf load_n(const Half* p, int64_t n) {
    return widen(load_half_n(p, n), Half{});
}
template <class Half>
inline void store_n(Half* p, vf x, int64_t n) {
    store_half_n(p, narrow(x, Half{}), n);
}

// Calls body(i, n) along a row of `size` elements: n = kWidth for whole vectors, less for the tail.
// In the body at(p + i, n) loads and put(p + i, x, n) stores; both are plain vector moves where n
// is kWidth.
template <class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t size, Body&& body) {
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) body(i, kWidth);
    if (i < size) body(i, static_cast<int>(size - i));
}
template <class T>
inline __attribute__((always_inline)) vf at(const T* p, int n) {
    return n == kWidth ? load(p) : load_n(p, n);
}
template <class T>
inline __attribute__((always_inline)) void put(T* p, vf x, int n) {
    n == kWidth ? store(p, x) : store_n(p, x, n);
}

// Stores that go past the caches: for results so large that no cache would still hold them, this
// saves the reading of every line before it is written. `p` is aligned to the bytes stored;
// streams_done() comes before others read.
#if defined(__AVX512F__)
inline void stream(float* p, vf x) { _mm512_stream_ps(p, reinterpret_cast<__m512>(x)); }
template <class Half>
inline void stream(Half* p, vf x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                        reinterpret_cast<__m256i>(narrow(x, Half{})));
}
inline void streams_done() { _mm_sfence(); }
#elif defined(__AVX2__)
inline void stream(float* p, vf x) { _mm256_stream_ps(p, reinterpret_cast<__m256>(x)); }
template <class Half>
inline void stream(Half* p, vf x) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(narrow(x, Half{})));
}
inline void streams_done() { _mm_sfence(); }
#else
template <class T>
inline void stream(T* p, vf x) {
    store(p, x);
}
inline void streams_done() {}
#endif
template <class T>
inline bool can_stream(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % (kWidth * sizeof(T)) == 0;
}

// x in the first n lanes, 0 in the rest: what lies past a row's end stays out of its sums.
inline __attribute__((always_inline)) vf first_lanes(vf x, int n) {
    if (n == kWidth) return x;
    vi index;
    for (int i = 0; i < kWidth; ++i) index[i] = i;
    return index < n ? x : vf{};
}

// ---- reductions: a fixed tree, so the same bits on every run

inline float reduce_add(vf x) {
    float lane[kWidth];
    std::memcpy(lane, &x, sizeof x);
    for (int half = kWidth / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    }
    return lane[0];
}

}  // namespace mllama::simd::MLLAMA_ISA
