// How a group of a block meets R rows of x, for every packing.
#pragma once

#include <type_traits>

#include "kernels/cpu/packed_groups.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

// A row of the activations.
struct FloatRow {
    FloatRow() = default;
    FloatRow(const PackedLinear& a, int64_t row)
        : values(a.activations.values + row * group_count(a.in) * kGroup) {}
    const float* values;
};
struct CodeRow {
    CodeRow() = default;
    CodeRow(const PackedLinear& a, int64_t row)
        : codes(a.activations.codes + row * group_count(a.in) * kGroup),
          scales(a.activations.scales + row * group_count(a.in)),
          sums(a.activations.sums + row * group_count(a.in) * 2),
          totals(a.activations.totals + row * group_count(a.in)) {}
    vi word(int64_t index) const { return splat_word(codes + index * 4); }  // four codes
    int32_t sum(int64_t g) const { return sums[2 * g] + sums[2 * g + 1]; }
    const int8_t* codes;
    const float* scales;
    const int16_t* sums;
    const float* totals;
};

// Rows that leave registers for more than one sum each.
constexpr bool is_few(int rows) { return rows <= 2; }

// A lane's sum so far. `end` follows a header's last group.
struct PlainSum {
    void end(const uint8_t*, int) {}
    vf total{};
};
// Of codes times s and of m, which their header's d and e scale at its end.
struct NestedSum {
    void end(const uint8_t* header, int v) {
        total += codes * lanes_f16(header + 2 * v * kWidth) -
                 minima * lanes_f16(header + 2 * kLanes + 2 * v * kWidth);
        codes = minima = vf{};
    }
    vf total{}, codes{}, minima{};
};

// A format whose groups are added to one sum.
template <class X>
struct OneSum {
    using Row = X;
    template <int R>
    using Sum = PlainSum;
};

struct F32 : OneSum<FloatRow> {
    template <int R>
    static void add(Sum<R> (&sum)[R], const uint8_t*, const uint8_t* p, int v, const Row (&x)[R],
                    int64_t g) {
#pragma GCC unroll 8
        for (int k = 0; k < kGroup; ++k) {
            vf weight = load(reinterpret_cast<const float*>(p) + k * kLanes + v * kWidth);
            for (int r = 0; r < R; ++r) sum[r].total += weight * splat(x[r].values[g * kGroup + k]);
        }
    }
};

// Two numbers of 16 bits side by side or in turn; odd inputs have sums of their own, since one
// would wait for each addition.
template <class Pair>
struct Half : OneSum<FloatRow> {
    template <int R>
    static void add(Sum<R> (&sum)[R], const uint8_t*, const uint8_t* p, int v, const Row (&x)[R],
                    int64_t g) {
        vf odd[R]{};
#pragma GCC unroll 4
        for (int k = 0; k < kGroup; k += 2) {
            Pair weight(p + k * kLanes * 2, v);
            for (int r = 0; r < R; ++r) {
                sum[r].total += weight.first * splat(x[r].values[g * kGroup + k]);
                odd[r] += weight.second * splat(x[r].values[g * kGroup + k + 1]);
            }
        }
        for (int r = 0; r < R; ++r) sum[r].total += odd[r];
    }
};
struct F16Pair {
    F16Pair(const uint8_t* p, int v)
        : first(lanes_f16(p + v * kWidth * 2)),
          second(lanes_f16(p + kLanes * 2 + v * kWidth * 2)) {}
    vf first, second;
};
struct Bf16Pair {
    Bf16Pair(const uint8_t* p, int v) {
        vu pair = load_bits(p + v * kWidth * 4);
        first = as_float(pair << 16), second = as_float(pair & 0xffff0000u);
    }
    vf first, second;
};

#if defined(__AVX512BF16__)
struct PairRow {
    PairRow() = default;
    PairRow(const PackedLinear& a, int64_t row)
        : pairs(reinterpret_cast<const uint32_t*>(a.activations.values) +
                row * group_count(a.in) * kGroup / 2) {}
    const uint32_t* pairs;
};
struct Bf16Pairs : OneSum<PairRow> {
    template <int R>
    static void add(Sum<R> (&sum)[R], const uint8_t*, const uint8_t* p, int, const Row (&x)[R],
                    int64_t g) {
#pragma GCC unroll 16
        for (int k = 0; k < kGroup / 2; ++k) {
            auto weight = reinterpret_cast<__m512bh>(load_bits(p + k * kLanes * 4));
            for (int r = 0; r < R; ++r) {
                auto pair = reinterpret_cast<__m512bh>(splat_word(x[r].pairs + g * kGroup / 2 + k));
                sum[r].total = reinterpret_cast<vf>(
                    _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum[r].total), weight, pair));
            }
        }
    }
};
#endif

struct Int8 : OneSum<CodeRow> {
    template <int R>
    static void add(Sum<R> (&sum)[R], const uint8_t*, const uint8_t* p, int v, const Row (&x)[R],
                    int64_t g) {
        SignedDot dots[R];
        for (int r = 0; r < R; ++r) dots[r].start(x[r].sum(g));
#pragma GCC unroll 8
        for (int j = 0; j < kGroup / 4; ++j) {
            SignedBytes codes(load_bits(p + 2 * kLanes + j * kLanes * 4 + v * kWidth * 4));
            for (int r = 0; r < R; ++r) dots[r].add(codes, x[r].word(g * 8 + j));
        }
        vf scale = lanes_f16(p + 2 * v * kWidth);
        for (int r = 0; r < R; ++r)
            sum[r].total += to_float(dots[r].value) * (scale * splat(x[r].scales[g]));
    }
};

// The dot products of codes with R rows of x, inputs 8 * kFirst to 8 * kLast of a group.
template <int kBits, int kFirst, int kLast, int R>
inline __attribute__((always_inline)) void code_dots(vi (&dots)[R], const uint8_t* p, int v,
                                                     const CodeRow (&x)[R], int64_t g) {
    CodeDot dot[R];
    p += v * kWidth * 4;
#pragma GCC unroll 4
    for (int j = kFirst; j < kLast; ++j) {
        vu pairs = load_bits(p + j * kLanes * 4);
        if constexpr (kBits == 4 && is_few(R)) {
            for (int r = 0; r < R; ++r)
                dot[r].add_halves(pairs, x[r].word(g * 8 + 2 * j), x[r].word(g * 8 + 2 * j + 1));
        } else {
            vu low = pairs & 0x0f0f0f0fu, high = (pairs >> 4) & 0x0f0f0f0fu;
            if constexpr (kBits > 4) {
                low |= upper_bits<kBits>(p + kNibbles, 2 * j);
                high |= upper_bits<kBits>(p + kNibbles, 2 * j + 1);
            }
            for (int r = 0; r < R; ++r) {
                dot[r].add(low, x[r].word(g * 8 + 2 * j));
                dot[r].add(high, x[r].word(g * 8 + 2 * j + 1));
            }
        }
        for (int r = 0; r < R; ++r) {
            if (2 * (j + 1) % kCodeSteps<kBits> == 0) dot[r].widen();
        }
    }
    for (int r = 0; r < R; ++r) dots[r] = dot[r].sum();
}

template <int R>
inline __attribute__((always_inline)) void add_parts(PlainSum (&sum)[R], const vi (&dots)[R],
                                                     vf scale, vf minimum, const CodeRow (&x)[R],
                                                     int64_t g) {
    for (int r = 0; r < R; ++r) {
        sum[r].total += to_float(dots[r]) * scale * splat(x[r].scales[g]);
        sum[r].total += minimum * splat(x[r].totals[g]);
    }
}

// Formats of scale * code + minimum in one group.
template <int kBits, class Numbers>
struct Affine : OneSum<CodeRow> {
    template <int R>
    static void add(Sum<R> (&sum)[R], const uint8_t* header, const uint8_t* p, int v,
                    const Row (&x)[R], int64_t g) {
        vi dots[R];
        code_dots<kBits, 0, kGroup / 8>(dots, p + Numbers::kBytes, v, x, g);
        Numbers n(header, p, v);
        add_parts(sum, dots, n.scale, n.minimum, x, g);
    }
};
template <int kBits>  // q4_0, q5_0
struct Centered {
    static constexpr int64_t kBytes = 2 * kLanes;
    Centered(const uint8_t*, const uint8_t* p, int v)
        : scale(lanes_f16(p + 2 * v * kWidth)),
          minimum(scale * -static_cast<float>(1 << (kBits - 1))) {}
    vf scale, minimum;
};
struct Shifted {  // q4_1, q5_1
    static constexpr int64_t kBytes = 4 * kLanes;
    Shifted(const uint8_t*, const uint8_t* p, int v)
        : scale(lanes_f16(p + 2 * v * kWidth)),
          minimum(lanes_f16(p + 2 * kLanes + 2 * v * kWidth)) {}
    vf scale, minimum;
};

template <int kBits>  // int4, q4_k, q5_k
struct Nested {
    using Row = CodeRow;
    template <int R>
    using Sum = NestedSum;
    template <int R>
    static void add(Sum<R> (&sum)[R], const uint8_t* header, const uint8_t* p, int v,
                    const Row (&x)[R], int64_t g) {
        vi dots[R];
        code_dots<kBits, 0, kGroup / 8>(dots, p + 2 * kLanes, v, x, g);
        vf s = lanes_u8(p + v * kWidth), m = lanes_u8(p + kLanes + v * kWidth);
        for (int r = 0; r < R; ++r) {
            sum[r].codes += to_float(dots[r]) * s * splat(x[r].scales[g]);
            sum[r].minima += m * splat(x[r].totals[g]);
        }
    }
};

struct Q6K : OneSum<CodeRow> {
    template <int R>
    static void add(Sum<R> (&sum)[R], const uint8_t* header, const uint8_t* p, int v,
                    const Row (&x)[R], int64_t g) {
        vi first[R], second[R];
        code_dots<6, 0, kGroup / 16>(first, p + 2 * kLanes, v, x, g);
        code_dots<6, kGroup / 16, kGroup / 8>(second, p + 2 * kLanes, v, x, g);
        vf d = lanes_f16(header + 2 * v * kWidth);
        vf one = d * lanes_s8(p + v * kWidth), other = d * lanes_s8(p + kLanes + v * kWidth);
        for (int r = 0; r < R; ++r) {
            vf part = to_float(first[r] - 32 * x[r].sums[2 * g]) * one +
                      to_float(second[r] - 32 * x[r].sums[2 * g + 1]) * other;
            sum[r].total += part * splat(x[r].scales[g]);
        }
    }
};

}  // namespace
}  // namespace mllama::kernels::MLLAMA_ISA
