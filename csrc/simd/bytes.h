// Products of bytes: in every 32-bit lane, four codes of a weight with four of x, summed.
#pragma once

#include <algorithm>

#include "simd/vec.h"

namespace mllama::simd::MLLAMA_ISA {

inline vu load_bits(const void* p) {
    vu words;
    std::memcpy(&words, p, sizeof words);
    return words;
}
// The four bytes at p in every lane.
inline vi splat_word(const void* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
#if defined(__AVX512F__)
    return reinterpret_cast<vi>(_mm512_set1_epi32(word));
#elif defined(__AVX2__)
    return reinterpret_cast<vi>(_mm256_set1_epi32(word));
#else
    return vi{} + word;
#endif
}
// The low byte of every lane.
inline void store_bytes(int8_t* p, vi x) {
    typedef int8_t vb __attribute__((vector_size(kWidth)));
    vb bytes = __builtin_convertvector(x, vb);
    std::memcpy(p, &bytes, sizeof bytes);
}
// The low halves of every lane.
inline void store_pairs(int16_t* p, vi x) {
    typedef int16_t vp __attribute__((vector_size(kWidth * 2)));
    vp pairs = __builtin_convertvector(x, vp);
    std::memcpy(p, &pairs, sizeof pairs);
}
// The nearest integer from -127 to 127; ties go to the even one.
inline vi nearest_code(vf x) {
    vf shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    vi code = reinterpret_cast<vi>(as_bits(shifted)) - 0x4b400000;
    return code < -127 ? vi{} - 127 : (code > 127 ? vi{} + 127 : code);
}
inline int32_t reduce_max(vi x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(x));
#elif defined(__AVX2__)
    __m256i y = reinterpret_cast<__m256i>(x);
    __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(z, _mm_shuffle_epi32(z, 0xb1)));
#else
    int32_t top = x[0];
    for (int i = 1; i < kWidth; ++i) top = std::max(top, x[i]);
    return top;
#endif
}
inline int32_t reduce_add(vi x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(x));
#elif defined(__AVX2__)
    __m256i y = reinterpret_cast<__m256i>(x);
    __m128i z = _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_add_epi32(z, _mm_shuffle_epi32(z, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(z, _mm_shuffle_epi32(z, 0xb1)));
#else
    int32_t sum = 0;
    for (int i = 0; i < kWidth; ++i) sum += x[i];
    return sum;
#endif
}
// The largest size of n floats, a multiple of kWidth. NaN where one is not finite.
inline float largest_size(const float* x, int n) {
    vi largest{};  // as integers, sizes have the same order, and what is not finite comes last
    for (int i = 0; i < n; i += kWidth) {
        vi size = reinterpret_cast<vi>(as_bits(load(x + i)) & 0x7fffffffu);
        largest = size > largest ? size : largest;
    }
    int32_t bits = reduce_max(largest);
    float top;
    std::memcpy(&top, &bits, sizeof top);
    return top + top * 0.0f;
}
inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// n signed bytes as floats, 0 in lanes past them.
inline vf load_codes(const int8_t* p, int n) {
#if defined(__AVX512F__)
    __m128i bytes = n == kWidth ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                                : _mm_maskz_loadu_epi8(first_n(n), p);
    return reinterpret_cast<vf>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#else
    int8_t bytes[kWidth]{};
    n == kWidth ? std::memcpy(bytes, p, kWidth) : std::memcpy(bytes, p, n);
#if defined(__AVX2__)
    __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    return reinterpret_cast<vf>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)));
#else
    vf x;
    for (int i = 0; i < kWidth; ++i) x[i] = bytes[i];
    return x;
#endif
#endif
}
// The bf16 at p in every lane.
inline vf splat_bf16(const void* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return as_float(reinterpret_cast<vu>(vi{} + static_cast<int32_t>(uint32_t{bits} << 16)));
}

// kWidth f16 numbers, or bytes from 0 to 255, as floats.
inline vf lanes_f16(const uint8_t* p) { return load(reinterpret_cast<const f16*>(p)); }
inline vf lanes_u8(const uint8_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<vf>(_mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
    return reinterpret_cast<vf>(_mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
    vf x;
    for (int i = 0; i < kWidth; ++i) x[i] = p[i];
    return x;
#endif
}
// Bytes from -128 to 127 likewise.
inline vf lanes_s8(const uint8_t* p) {
    vf x = lanes_u8(p);
    return x < 128.0f ? x : x - 256.0f;
}

// CodeDot: unsigned weights of kBits bits, 4 to 6; add_halves takes the low and the high halves of
// bytes. widen() has to follow every kCodeSteps<kBits> products at the latest.
template <int kBits>
constexpr int kCodeSteps = 32 >> (kBits - 2);

#if defined(__AVX512VNNI__)

inline __m512i raw(vi x) { return reinterpret_cast<__m512i>(x); }
inline __m512i raw(vu x) { return reinterpret_cast<__m512i>(x); }

class CodeDot {
  public:
    void add(vu weight, vi x) { low_ = dot(low_, weight, x); }
    void add_halves(vu weights, vi low, vi high) {
        low_ = dot(low_, weights & 0x0f0f0f0fu, low);
        high_ = dot(high_, weights & 0xf0f0f0f0u, high);  // 16 times too much: saves a shift
    }
    void widen() {}
    vi sum() const { return low_ + (high_ >> 4); }

  private:
    static vi dot(vi sum, vu weight, vi x) {
        return reinterpret_cast<vi>(_mm512_dpbusd_epi32(raw(sum), raw(weight), raw(x)));
    }
    vi low_{}, high_{};
};

// Signed weights. The instruction multiplies unsigned bytes with signed ones: 128 is added to every
// weight, and 128 times the sum of x taken off.
struct SignedBytes {
    explicit SignedBytes(vu weight) : shifted(weight ^ 0x80808080u) {}
    vu shifted;
};
struct SignedDot {
    void start(int32_t x_sum) { value = vi{} - 128 * x_sum; }
    void add(const SignedBytes& w, vi x) {
        value = reinterpret_cast<vi>(_mm512_dpbusd_epi32(raw(value), raw(w.shifted), raw(x)));
    }
    vi value;
};

#elif defined(__AVX2__)

// Products of 16-bit codes, two in every lane, summed.
inline vi multiply_pairs(vu weight, vi x) {
#if defined(__AVX512BW__)
    return reinterpret_cast<vi>(
        _mm512_madd_epi16(reinterpret_cast<__m512i>(weight), reinterpret_cast<__m512i>(x)));
#else
    return reinterpret_cast<vi>(
        _mm256_madd_epi16(reinterpret_cast<__m256i>(weight), reinterpret_cast<__m256i>(x)));
#endif
}

// vpmaddubsw adds two products in 16 bits. Of codes below 2^kBits and x in [-127, 127], the sums of
// kCodeSteps<kBits> instructions fit.
class CodeDot {
  public:
#if defined(__AVX512BW__)
    void add(vu weight, vi x) {
        sums_ = _mm512_add_epi16(sums_, _mm512_maddubs_epi16(reinterpret_cast<__m512i>(weight),
                                                             reinterpret_cast<__m512i>(x)));
    }
    void widen() {
        value_ += reinterpret_cast<vi>(_mm512_madd_epi16(sums_, _mm512_set1_epi16(1)));
        sums_ = _mm512_setzero_si512();
    }
#else
    void add(vu weight, vi x) {
        sums_ = _mm256_add_epi16(sums_, _mm256_maddubs_epi16(reinterpret_cast<__m256i>(weight),
                                                             reinterpret_cast<__m256i>(x)));
    }
    void widen() {
        value_ += reinterpret_cast<vi>(_mm256_madd_epi16(sums_, _mm256_set1_epi16(1)));
        sums_ = _mm256_setzero_si256();
    }
#endif
    void add_halves(vu weights, vi low, vi high) {
        add(weights & 0x0f0f0f0fu, low);
        add((weights >> 4) & 0x0f0f0f0fu, high);
    }
    vi sum() const { return value_; }

  private:
    vi value_{};
#if defined(__AVX512BW__)
    __m512i sums_ = _mm512_setzero_si512();
#else
    __m256i sums_ = _mm256_setzero_si256();
#endif
};

// Signed weights: the weight's sign goes over to x, and |weight| <= 128 with |x| <= 127 keeps the
// sum of two products within 16 bits.
#if defined(__AVX512BW__)
struct SignedBytes {
    explicit SignedBytes(vu weight)
        : size(_mm512_abs_epi8(reinterpret_cast<__m512i>(weight))),
          negative(_mm512_movepi8_mask(reinterpret_cast<__m512i>(weight))) {}
    __m512i size;
    __mmask64 negative;
};
#else
struct SignedBytes {
    explicit SignedBytes(vu weight)
        : bytes(reinterpret_cast<__m256i>(weight)), size(_mm256_abs_epi8(bytes)) {}
    __m256i bytes, size;
};
#endif
struct SignedDot {
    void start(int32_t) { value = vi{}; }
    void add(const SignedBytes& w, vi x) {
#if defined(__AVX512BW__)
        __m512i bytes = reinterpret_cast<__m512i>(x);
        __m512i turned = _mm512_mask_sub_epi8(bytes, w.negative, _mm512_setzero_si512(), bytes);
        value += reinterpret_cast<vi>(
            _mm512_madd_epi16(_mm512_maddubs_epi16(w.size, turned), _mm512_set1_epi16(1)));
#else
        __m256i turned = _mm256_sign_epi8(reinterpret_cast<__m256i>(x), w.bytes);
        value += reinterpret_cast<vi>(
            _mm256_madd_epi16(_mm256_maddubs_epi16(w.size, turned), _mm256_set1_epi16(1)));
#endif
    }
    vi value;
};

#else

// Byte number `index` of every lane, sign-extended.
inline vi byte_of(vi x, int index) { return x << (24 - 8 * index) >> 24; }

class CodeDot {
  public:
    void add(vu weight, vi x) {
        for (int i = 0; i < 4; ++i)
            value_ += byte_of(reinterpret_cast<vi>(weight), i) * byte_of(x, i);
    }
    void add_halves(vu weights, vi low, vi high) {
        add(weights & 0x0f0f0f0fu, low);
        add((weights >> 4) & 0x0f0f0f0fu, high);
    }
    void widen() {}
    vi sum() const { return value_; }

  private:
    vi value_{};
};
struct SignedBytes {
    explicit SignedBytes(vu weight) : bytes(reinterpret_cast<vi>(weight)) {}
    vi bytes;
};
struct SignedDot {
    void start(int32_t) { value = vi{}; }
    void add(const SignedBytes& w, vi x) {
        for (int i = 0; i < 4; ++i) value += byte_of(w.bytes, i) * byte_of(x, i);
    }
    vi value;
};

#endif

}  // namespace mllama::simd::MLLAMA_ISA
