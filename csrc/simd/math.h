// Elementary functions on vectors of f32.
#pragma once

#include "simd/vec.h"

namespace mllama::simd::MLLAMA_ISA {

// p * 2^n for integers n in [-150, 129], gradual underflow and overflow to infinity included.
inline vf times_power_of_2(vf p, vf n) {
#if defined(__AVX512F__)
    return reinterpret_cast<vf>(
        _mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
    vi exponent = __builtin_convertvector(n, vi),
       half = exponent >> 1;  // two factors, since each ends at 2^127
    return p * as_float((half + 127) << 23) * as_float((exponent - half + 127) << 23);
#endif
}

// e^x, for every float: 0 and infinity where f32 ends, NaN for NaN. Largest error measured over all
// floats: 0.9 ulp, 1.2 without FMA. x = n ln 2 + r with |r| <= ln2 / 2; e^r = 1 + r + r^2 q(r) by
// the minimax polynomial of relative error 3e-9.
inline vf exp(vf x) {
    x = min(splat(89.0f), max(splat(-104.0f), x));  // in this order a NaN stays
    vf shifted =
        x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold round(x / ln 2)
    vf n = shifted - 12582912.0f;
    vf r = x - n * 0.693145752f - n * 1.42860677e-6f;
    vf q = splat(0.00138145394f);
    q = q * r + 0.00836874545f;
    q = q * r + 0.041668389f;
    q = q * r + 0.166665211f;
    q = q * r + 0.49999994f;
    q = q * r + 1.0f;
    return times_power_of_2(q * r + 1.0f, n);
}

// The same where the result ends in 16 bits: a shorter way, of relative error below 2e-5 (bf16
// rounds by 4e-3, f16 by 5e-4). 2^t = 2^n 2^f with |f| <= 1/2, by the minimax polynomial of
// degree 4.
inline vf exp_16bit(vf x) {
    vf t = min(splat(129.0f), max(splat(-150.0f), x * 1.44269504f));
    vf n = t + 12582912.0f - 12582912.0f, f = t - n;
    vf p = splat(0.00952826522f);
    p = p * f + 0.0557936199f;
    p = p * f + 0.240251135f;
    p = p * f + 0.693147181f;
    return times_power_of_2(p * f + 1.0f, n);
}

// The rational minimax approximation that Eigen uses; it reaches 1 where f32 does. Largest error
// measured over all floats: TANH_ULP.
inline vf tanh(vf x) {
    x = min(splat(7.90531111f), max(splat(-7.90531111f), x));  // in this order a NaN stays
    vf s = x * x;
    vf p = splat(-2.76076847742355e-16f);
    p = p * s + 2.00018790482477e-13f;
    p = p * s - 8.60467152213735e-11f;
    p = p * s + 5.12229709037114e-08f;
    p = p * s + 1.48572235717979e-05f;
    p = p * s + 6.37261928875436e-04f;
    p = p * s + 4.89352455891786e-03f;
    vf q = splat(1.19825839466702e-06f);
    q = q * s + 1.18534705686654e-04f;
    q = q * s + 2.26843463243900e-03f;
    q = q * s + 4.89352518554385e-03f;
    return x * p / q;
}

// Largest error measured over all floats: 2.5 ulp.
inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
inline vf sigmoid_16bit(vf x) { return 1.0f / (1.0f + exp_16bit(-x)); }

// GELU's tanh approximation is x sigmoid(gelu_argument(x)).
constexpr float kGeluScale = 1.59576912f, kGeluCubic = 0.044715f;  // 2 sqrt(2 / pi)
inline vf gelu_argument(vf x) { return kGeluScale * x * (1.0f + kGeluCubic * (x * x)); }

// GELU by its definition, x times the normal distribution function. Above 0 that is 1 - q(x), below
// q(-x), with q(x) = e^(-x^2 / 2) t p(t) and t = 1 / (1 + 0.35 x). The minimax polynomial p has
// relative error 4e-7 up to x = 9, beyond which q is below 2e-19.
inline vf gelu(vf x) {
    vf size = max(x, -x), t = 1.0f / (1.0f + 0.35f * size);
    vf p = splat(0.0466096103f);
    p = p * t - 0.192525342f;
    p = p * t + 0.224254176f;
    p = p * t - 0.00198685029f;
    p = p * t + 0.147971258f;
    p = p * t + 0.135809928f;
    p = p * t + 0.139867052f;
    vf q = p * t * exp(-0.5f * x * x);
    return x * (x < 0.0f ? q : 1.0f - q);
}

}  // namespace mllama::simd::MLLAMA_ISA
