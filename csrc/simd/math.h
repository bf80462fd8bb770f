// Elementary functions on vectors, accurate to about 2 units in the last place of f32.
#pragma once

#include "simd/vec.h"

namespace mllama::simd::MLLAMA_ISA {

// e^x. Below the smallest normal f32 the result is 0, above the largest it is infinity; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln2 / 2; e^r by its Taylor polynomial of degree 7 (error below 1e-8), 2^n by the exponent.
inline vf exp(vf x) {
    constexpr float kHighest = 88.7228394f, kLowest = -87.3365402f;
    vf clamped = min(max(x, splat(kLowest)), splat(kHighest));
    vf shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold round(x / ln 2)
    vf n = shifted - 12582912.0f;
    vf r = clamped - n * 0.693145752f - n * 1.42860677e-6f;
    vf p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vi exponent = __builtin_convertvector(n, vi), half = exponent >> 1;  // 2^n in two factors: n may be 128
    vf result = p * as_float((half + 127) << 23) * as_float((exponent - half + 127) << 23);
    result = x < kLowest ? splat(0.0f) : result;
    result = x > kHighest ? splat(__builtin_inff()) : result;
    return x != x ? x : result;
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// tanh by e^-2|x|; near 0, where that cancels, by its odd series.
inline vf tanh(vf x) {
    vf size = max(x, -x), e = exp(size * -2.0f);
    vf far = (1.0f - e) / (1.0f + e);
    vf x2 = x * x;
    vf near = size + size * x2 * (-1.0f / 3 + x2 * (2.0f / 15 + x2 * (-17.0f / 315 + x2 * (62.0f / 2835))));
    vf result = size < 0.25f ? near : far;
    result = x < 0.0f ? -result : result;
    return x != x ? x : result;
}

}  // namespace mllama::simd::MLLAMA_ISA
