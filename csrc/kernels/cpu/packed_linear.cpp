#include "kernels/cpu/packed_linear.h"

#include <algorithm>

#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/packed_groups.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

constexpr int kRows = kWidth == 16 ? 8 : 4;  // of x at a time: as many sums as there is room for
constexpr int64_t kRowsInCache = 128;
constexpr int64_t kAhead = 1024;  // bytes; hides what the hardware's prefetcher misses

// ---- activations

// Codes in [-127, 127], the scale that gives the values back, and the sums of the codes in either
// half. Values that are not finite give a scale that is not.
void quantize_group(const float* x, int8_t* codes, float* scale, int16_t* sums) {
    float top = largest_size(x, kGroup);
    *scale = top / 127.0f;
    vf inverse = splat(top > 0 ? 127.0f / top : 0.0f);
    vi total[2]{};
    for (int i = 0; i < kGroup; i += kWidth) {
        vi code = nearest_code(load(x + i) * inverse);
        total[i / (kGroup / 2)] += code;
        store_bytes(codes + i, code);
    }
    for (int half = 0; half < 2; ++half) {
        int32_t sum = 0;
        for (int i = 0; i < kWidth; ++i) sum += total[half][i];
        sums[half] = static_cast<int16_t>(sum);
    }
}

template <class T>
void prepare_row(const PackedLinear& a, int64_t row) {
    int64_t groups = group_count(a.in), width = groups * kGroup;
    const T* x = static_cast<const T*>(a.x) + row * a.in;
    if (takes_pairs(a)) {
        T* to = reinterpret_cast<T*>(a.activations.values) + row * width;
        std::copy_n(x, a.in, to);
        std::fill(to + a.in, to + width, T{});
        return;
    }
    float group[kGroup];
    for (int64_t g = 0; g < groups; ++g) {
        int64_t count = std::min(kGroup, a.in - g * kGroup), at_group = row * groups + g;
        float* to = size_of(a.packing).quantized ? group : a.activations.values + at_group * kGroup;
        for (int i = 0; i < kGroup; i += kWidth) {
            int64_t left = std::clamp<int64_t>(count - i, 0, kWidth);
            store(to + i,
                  left == kWidth ? load(x + g * kGroup + i) : load_n(x + g * kGroup + i, left));
        }
        if (size_of(a.packing).quantized) {
            quantize_group(group, a.activations.codes + at_group * kGroup,
                           a.activations.scales + at_group, a.activations.sums + 2 * at_group);
        }
    }
}

// ---- one group of one block, for R rows of x

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
          sums(a.activations.sums + row * group_count(a.in) * 2) {}
    vi word(int64_t index) const { return splat_word(codes + index * 4); }  // four codes
    int32_t sum(int64_t g) const { return sums[2 * g] + sums[2 * g + 1]; }
    const int8_t* codes;
    const float* scales;
    const int16_t* sums;
};

struct F32 {
    using Row = FloatRow;
    template <int R>
    static void add(vf (&sum)[R], const uint8_t*, const uint8_t* p, int v, const Row (&x)[R],
                    int64_t g) {
        const float* w = reinterpret_cast<const float*>(p) + v * kWidth;
#pragma GCC unroll 8
        for (int k = 0; k < kGroup; ++k) {
            vf weight = load(w + k * kLanes);
            for (int r = 0; r < R; ++r) sum[r] += weight * splat(x[r].values[g * kGroup + k]);
        }
    }
};

struct F16 {
    using Row = FloatRow;
    template <int R>
    static void add(vf (&sum)[R], const uint8_t*, const uint8_t* p, int v, const Row (&x)[R],
                    int64_t g) {
        const f16* w = reinterpret_cast<const f16*>(p) + v * kWidth;
        vf odd[R]{};  // a second sum, since one would wait for each addition
#pragma GCC unroll 4
        for (int k = 0; k < kGroup; k += 2) {
            vf first = load(w + k * kLanes), second = load(w + (k + 1) * kLanes);
            for (int r = 0; r < R; ++r) {
                sum[r] += first * splat(x[r].values[g * kGroup + k]);
                odd[r] += second * splat(x[r].values[g * kGroup + k + 1]);
            }
        }
        for (int r = 0; r < R; ++r) sum[r] += odd[r];
    }
};

struct Bf16 {
    using Row = FloatRow;
    template <int R>
    static void add(vf (&sum)[R], const uint8_t*, const uint8_t* p, int v, const Row (&x)[R],
                    int64_t g) {
        vf odd[R]{};
#pragma GCC unroll 4
        for (int k = 0; k < kGroup; k += 2) {
            vu pair = load_bits(p + k / 2 * kLanes * 4 + v * kWidth * 4);
            vf first = as_float(pair << 16), second = as_float(pair & 0xffff0000u);
            for (int r = 0; r < R; ++r) {
                sum[r] += first * splat(x[r].values[g * kGroup + k]);
                odd[r] += second * splat(x[r].values[g * kGroup + k + 1]);
            }
        }
        for (int r = 0; r < R; ++r) sum[r] += odd[r];
    }
};

#if defined(__AVX512BF16__)
struct PairRow {
    PairRow() = default;
    PairRow(const PackedLinear& a, int64_t row)
        : pairs(reinterpret_cast<const uint32_t*>(a.activations.values) +
                row * group_count(a.in) * kGroup / 2) {}
    const uint32_t* pairs;
};
struct Bf16Pairs {
    using Row = PairRow;
    template <int R>
    static void add(vf (&sum)[R], const uint8_t*, const uint8_t* p, int, const Row (&x)[R],
                    int64_t g) {
#pragma GCC unroll 16
        for (int k = 0; k < kGroup / 2; ++k) {
            auto weight = reinterpret_cast<__m512bh>(load_bits(p + k * kLanes * 4));
            for (int r = 0; r < R; ++r) {
                auto pair = reinterpret_cast<__m512bh>(splat_word(x[r].pairs + g * kGroup / 2 + k));
                sum[r] = reinterpret_cast<vf>(
                    _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum[r]), weight, pair));
            }
        }
    }
};
#endif

struct Int8 {
    using Row = CodeRow;
    template <int R>
    static void add(vf (&sum)[R], const uint8_t*, const uint8_t* p, int v, const Row (&x)[R],
                    int64_t g) {
        SignedDot dots[R];
        for (int r = 0; r < R; ++r) dots[r].start(x[r].sum(g));
#pragma GCC unroll 8
        for (int j = 0; j < kGroup / 4; ++j) {
            SignedBytes w(load_bits(p + 2 * kLanes + j * kLanes * 4 + v * kWidth * 4));
            for (int r = 0; r < R; ++r) dots[r].add(w, x[r].word(g * 8 + j));
        }
        vf scale = lanes_f16(p + 2 * v * kWidth);
        for (int r = 0; r < R; ++r)
            sum[r] += to_float(dots[r].value) * (scale * splat(x[r].scales[g]));
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
        vu low = pairs & 0x0f0f0f0fu, high = (pairs >> 4) & 0x0f0f0f0fu;
        if constexpr (kBits > 4) {
            low |= upper_bits<kBits>(p + kNibbles, 2 * j);
            high |= upper_bits<kBits>(p + kNibbles, 2 * j + 1);
        }
        for (int r = 0; r < R; ++r) {
            dot[r].add(low, x[r].word(g * 8 + 2 * j));
            dot[r].add(high, x[r].word(g * 8 + 2 * j + 1));
            if (2 * (j + 1) % kCodeSteps<kBits> == 0) dot[r].widen();
        }
    }
    for (int r = 0; r < R; ++r) dots[r] = dot[r].value;
}

// Adds a group of scale * code + minimum to the sums.
template <int kBits, int R>
inline __attribute__((always_inline)) void add_codes(vf (&sum)[R], const uint8_t* p, int v,
                                                     vf scale, vf minimum, const CodeRow (&x)[R],
                                                     int64_t g) {
    vi dots[R];
    code_dots<kBits, 0, kGroup / 8>(dots, p, v, x, g);
    for (int r = 0; r < R; ++r) {
        vf part = to_float(dots[r]) * scale + minimum * splat(static_cast<float>(x[r].sum(g)));
        sum[r] += part * splat(x[r].scales[g]);
    }
}

template <int kBits>  // q4_0, q5_0
struct Centered {
    using Row = CodeRow;
    template <int R>
    static void add(vf (&sum)[R], const uint8_t*, const uint8_t* p, int v, const Row (&x)[R],
                    int64_t g) {
        constexpr float kCenter = 1 << (kBits - 1);
        vf scale = lanes_f16(p + 2 * v * kWidth);
        add_codes<kBits>(sum, p + 2 * kLanes, v, scale, scale * -kCenter, x, g);
    }
};

template <int kBits>  // q4_1, q5_1
struct Shifted {
    using Row = CodeRow;
    template <int R>
    static void add(vf (&sum)[R], const uint8_t*, const uint8_t* p, int v, const Row (&x)[R],
                    int64_t g) {
        add_codes<kBits>(sum, p + 4 * kLanes, v, lanes_f16(p + 2 * v * kWidth),
                         lanes_f16(p + 2 * kLanes + 2 * v * kWidth), x, g);
    }
};

template <int kBits>  // int4, q4_k, q5_k
struct Nested {
    using Row = CodeRow;
    template <int R>
    static void add(vf (&sum)[R], const uint8_t* header, const uint8_t* p, int v, const Row (&x)[R],
                    int64_t g) {
        vf scale = lanes_f16(header + 2 * v * kWidth) * lanes_u8(p + v * kWidth);
        vf minimum =
            lanes_f16(header + 2 * kLanes + 2 * v * kWidth) * lanes_u8(p + kLanes + v * kWidth);
        add_codes<kBits>(sum, p + 2 * kLanes, v, scale, -minimum, x, g);
    }
};

struct Q6K {
    using Row = CodeRow;
    template <int R>
    static void add(vf (&sum)[R], const uint8_t* header, const uint8_t* p, int v, const Row (&x)[R],
                    int64_t g) {
        vi first[R], second[R];
        code_dots<6, 0, kGroup / 16>(first, p + 2 * kLanes, v, x, g);
        code_dots<6, kGroup / 16, kGroup / 8>(second, p + 2 * kLanes, v, x, g);
        vf d = lanes_f16(header + 2 * v * kWidth);
        vf one = d * lanes_s8(p + v * kWidth), other = d * lanes_s8(p + kLanes + v * kWidth);
        for (int r = 0; r < R; ++r) {
            vf part = to_float(first[r] - 32 * x[r].sums[2 * g]) * one +
                      to_float(second[r] - 32 * x[r].sums[2 * g + 1]) * other;
            sum[r] += part * splat(x[r].scales[g]);
        }
    }
};

template <class Body>
void dispatch_format(const PackedLinear& a, Body&& body) {
#if defined(__AVX512BF16__)
    if (takes_pairs(a)) return body(Bf16Pairs{});
#endif
    switch (a.packing) {
        case Packing::f32: return body(F32{});
        case Packing::bf16: return body(Bf16{});
        case Packing::f16: return body(F16{});
        case Packing::int8: return body(Int8{});
        case Packing::int4:
        case Packing::q4_k: return body(Nested<4>{});
        case Packing::q5_k: return body(Nested<5>{});
        case Packing::q4_0: return body(Centered<4>{});
        case Packing::q5_0: return body(Centered<5>{});
        case Packing::q4_1: return body(Shifted<4>{});
        case Packing::q5_1: return body(Shifted<5>{});
        case Packing::q6_k: return body(Q6K{});
    }
}

// ---- whole blocks

template <class T>
void store_lanes(const PackedLinear& a, int64_t row, int64_t first, int v, vf sum) {
    int64_t lane = first + v * kWidth, count = std::clamp<int64_t>(a.out - lane, 0, kWidth);
    if (count == 0) return;
    if (a.bias) sum += count == kWidth ? load(a.bias + lane) : load_n(a.bias + lane, count);
    put(static_cast<T*>(a.y) + row * a.out + lane, sum, static_cast<int>(count));
}

// Columns [block * kLanes, ...) of the rows row .. row + R of y.
template <class Format, int R>
void multiply_block(const PackedLinear& a, int64_t block, int64_t row) {
    const PackingSize& size = size_of(a.packing);
    const uint8_t *p = a.weight + block * block_bytes(a.packing, a.in), *header = p;
    typename Format::Row x[R];
    for (int r = 0; r < R; ++r) x[r] = typename Format::Row(a, row + r);
    vf sum[kVectors][R]{};
    int64_t left = 0;  // groups of this header
    for (int64_t g = 0, groups = group_count(a.in); g < groups; ++g, p += size.group) {
        if (left-- == 0) header = p, p += size.header, left = size.span - 1;
        for (int64_t line = 0; line < size.group; line += 64) __builtin_prefetch(p + kAhead + line);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) Format::add(sum[v], header, p, v, x, g);
    }
    for (int v = 0; v < kVectors; ++v) {
        for (int r = 0; r < R; ++r) {
            dispatch(a.dtype, [&](auto t) {
                store_lanes<decltype(t)>(a, row + r, block * kLanes, v, sum[v][r]);
            });
        }
    }
}

template <class Format>
void multiply_rows(const PackedLinear& a, int64_t block, int64_t row, int64_t end) {
    for (; row + kRows <= end; row += kRows) multiply_block<Format, kRows>(a, block, row);
    for (; row + 2 <= end; row += 2) multiply_block<Format, 2>(a, block, row);
    if (row < end) multiply_block<Format, 1>(a, block, row);
}

}  // namespace

void packed_activations(const PackedLinear& a, int64_t first, int64_t last) {
    if (takes_panels(a)) return gemm_activations(a, first, last);
    dispatch(a.dtype, [&](auto t) {
        for (int64_t row = first; row < last; ++row) prepare_row<decltype(t)>(a, row);
    });
}

// Blocks pass over some rows of x that the cache holds, and those over a block's weights.
void packed_product(const PackedLinear& a, int64_t first, int64_t last) {
    if (takes_panels(a)) return gemm_product(a, first, last);
    dispatch_format(a, [&](auto format) {
        using Format = decltype(format);
        for (int64_t row = 0; row < a.rows; row += kRowsInCache) {
            int64_t end = std::min(row + kRowsInCache, a.rows);
            for (int64_t block = first; block < last; ++block)
                multiply_rows<Format>(a, block, row, end);
        }
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
