// Register tiles over panels of unpacked weights.
#pragma once

#include "kernels/cpu/packed_panels.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

// ---- floats

// sums[r][lane] += x[r] times the panel, for R rows and NV vectors of lanes from `lane` on. Rows of
// x are `words` apart.
template <class E, int R, int NV>
void multiply_floats(const FloatPanel& panel, int64_t lane, const Word* x, int64_t words,
                     float* sums) {
    vf tile[R][NV];
    for_tile<NV, R>([&](int r, int n) { tile[r][n] = load(sums + r * kPanelLanes + n * kWidth); });
    const Word* w[NV];
    for (int n = 0; n < NV; ++n, lane += kWidth) w[n] = panel.blocks[lane / kLanes] + lane % kLanes;
#pragma GCC unroll 4
    for (int64_t k = 0; k < words; ++k) {
        vf weight[NV], row{};
#pragma GCC unroll 3
        for (int n = 0; n < NV; ++n) weight[n] = load_words(w[n] + k * kLanes);
        for_tile<NV, R>([&](int r, int n) {
            if (n == 0) row = E::broadcast(x + r * words + k);
            tile[r][n] = E::multiply_add(row, weight[n], tile[r][n]);
        });
    }
    for_tile<NV, R>([&](int r, int n) { store(sums + r * kPanelLanes + n * kWidth, tile[r][n]); });
}

// ---- codes

#if defined(__AVX2__)

// A row of x in one chunk: words as the panel's, and what each group's products are multiplied
// with. The rows after it follow.
struct CodeRows {
    const uint32_t* words;
    const float *scales, *sums;
};

// Sums of products with the words of a group; kRun words at a time, then widen().
#if defined(__AVX512VNNI__)
struct BiasedDot {
    static constexpr int kWords = kGroup / 4, kRun = kWords;
    void start(const int32_t* from) { std::memcpy(&value, from, sizeof value); }
    void add(vu weight, vi x) {
        value = reinterpret_cast<vi>(_mm512_dpbusd_epi32(raw(value), raw(x), raw(weight)));
    }
    void widen() {}
    vi sum() const { return value; }
    vi value;
};
template <int kBits>
using PanelDot = BiasedDot;
#else
template <int kBits>
struct ByteDot : CodeDot {
    static constexpr int kWords = kGroup / 4, kRun = kCodeSteps<kBits>;
    void start(const int32_t*) {}
};
struct PairDot {
    static constexpr int kWords = kGroup / 2, kRun = kWords;
    void start(const int32_t*) {}
    void add(vu weight, vi x) { value += multiply_pairs(weight, x); }
    void widen() {}
    vi sum() const { return value; }
    vi value{};
};
template <int kBits>
using PanelDot = std::conditional_t<code_form(kBits) == CodeForm::pairs, PairDot, ByteDot<kBits> >;
#endif

// As multiply_floats. Each of a group's kParts has a scale.
template <class Dot, int kParts, bool kMinimum, int R, int NV>
void multiply_codes(const CodePanel& panel, int64_t lane, CodeRows x, int64_t groups, float* sums) {
    constexpr int kWords = Dot::kWords / kParts, kRun = Dot::kRun / kParts;
    int64_t block = lane / kLanes, at = lane % kLanes, width = groups * Dot::kWords;
    vf tile[R][NV];
    for_tile<NV, R>([&](int r, int n) { tile[r][n] = load(sums + r * kPanelLanes + n * kWidth); });
    for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
            Dot dot[R][NV];
            for_tile<NV, R>([&](int r, int n) {
                dot[r][n].start(
                    &panel.starts[block + n / kVectors][g][part][at + n % kVectors * kWidth]);
            });
            const uint32_t* w = &panel.words[block][g][part * kWords][at];
#pragma GCC unroll 4
            for (int run = 0; run < kWords; run += kRun) {
#pragma GCC unroll 2  // whole runs, unrolled, are sums of products that wait in memory (GCC 12)
                for (int j = 0; j < kRun; ++j, ++x.words, w += kLanes) {
                    vu weight[NV];
#pragma GCC unroll 3
                    for (int n = 0; n < NV; ++n)
                        weight[n] = load_bits(w + n / kVectors * (sizeof panel.words[0] / 4) +
                                              n % kVectors * kWidth);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        vi word = splat_word(x.words + r * width);
#pragma GCC unroll 3
                        for (int n = 0; n < NV; ++n) dot[r][n].add(weight[n], word);
                    }
                }
                for_tile<NV, R>([&](int r, int n) { dot[r][n].widen(); });
            }
            for_tile<NV, R>([&](int r, int n) {
                vf scale =
                    load(&panel.scales[block + n / kVectors][g][part][at + n % kVectors * kWidth]);
                tile[r][n] += to_float(dot[r][n].sum()) * scale * splat(x.scales[r * groups + g]);
            });
        }
        if constexpr (kMinimum) {
            for_tile<NV, R>([&](int r, int n) {
                vf minimum =
                    load(&panel.minima[block + n / kVectors][g][at + n % kVectors * kWidth]);
                tile[r][n] += minimum * splat(x.sums[r * groups + g]);
            });
        }
    }
    for_tile<NV, R>([&](int r, int n) { store(sums + r * kPanelLanes + n * kWidth, tile[r][n]); });
}

#endif

}  // namespace
}  // namespace mllama::kernels::MLLAMA_ISA
