// Sums across lanes, of as many vectors as a vector has lanes.
#pragma once

#include "simd/vec.h"

namespace mllama::simd::MLLAMA_ISA {

// Lane i of the result is the sum of the lanes of acc[i].
inline __attribute__((always_inline)) vf sum_each(const vf (&acc)[kWidth]) {
#if defined(__AVX512F__)
    // Halving steps: each adds the two halves of two vectors and leaves both results in one.
    vf x[8], y[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        __m512 a = reinterpret_cast<__m512>(acc[2 * i]),
               b = reinterpret_cast<__m512>(acc[2 * i + 1]);
        x[i] = reinterpret_cast<vf>(_mm512_unpacklo_ps(a, b)) +
               reinterpret_cast<vf>(_mm512_unpackhi_ps(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        __m512d a = reinterpret_cast<__m512d>(x[2 * i]),
                b = reinterpret_cast<__m512d>(x[2 * i + 1]);
        y[i] = reinterpret_cast<vf>(_mm512_unpacklo_pd(a, b)) +
               reinterpret_cast<vf>(_mm512_unpackhi_pd(a, b));
    }
    auto parts = [](vf first, vf second) {  // of 128 bits: 0 + 1 and 2 + 3 of both
        __m512 a = reinterpret_cast<__m512>(first), b = reinterpret_cast<__m512>(second);
        return reinterpret_cast<vf>(_mm512_shuffle_f32x4(a, b, 0x88)) +
               reinterpret_cast<vf>(_mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return parts(parts(y[0], y[1]), parts(y[2], y[3]));
#elif defined(__AVX2__)
    auto pair = [](vf a, vf b) {
        return reinterpret_cast<vf>(
            _mm256_hadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
    };
    __m256 a = reinterpret_cast<__m256>(pair(pair(acc[0], acc[1]), pair(acc[2], acc[3])));
    __m256 b = reinterpret_cast<__m256>(pair(pair(acc[4], acc[5]), pair(acc[6], acc[7])));
    return reinterpret_cast<vf>(_mm256_permute2f128_ps(a, b, 0x20)) +
           reinterpret_cast<vf>(_mm256_permute2f128_ps(a, b, 0x31));
#else
    vf sums{};
    for (int i = 0; i < kWidth; ++i) sums[i] = reduce_add(acc[i]);
    return sums;
#endif
}

}  // namespace mllama::simd::MLLAMA_ISA
