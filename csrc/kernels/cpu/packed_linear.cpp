#include "kernels/cpu/packed_linear.h"

#include <algorithm>

#include "kernels/cpu/packed_epilogue.h"
#include "kernels/cpu/packed_formats.h"
#include "kernels/cpu/packed_gemm.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

constexpr int kRows = kWidth == 16 ? 8 : 4;  // of x at a time: as many sums as there is room for
constexpr int64_t kRowsInCache = 128;
constexpr int64_t kAhead = 4096;  // bytes; hides what the hardware's prefetcher misses

// ---- activations

// Codes in [-127, 127], the scale that gives the values back, the sums of the codes in either half,
// and the sum of what all codes stand for. Values that are not finite give a scale that is not.
void quantize_group(const float* x, int8_t* codes, float* scale, int16_t* sums, float* total) {
    float top = largest_size(x, kGroup);
    *scale = top / 127.0f;
    vf inverse = splat(top > 0 ? 127.0f / top : 0.0f);
    vi sum[2]{};
    for (int i = 0; i < kGroup; i += kWidth) {
        vi code = nearest_code(load(x + i) * inverse);
        sum[i / (kGroup / 2)] += code;
        store_bytes(codes + i, code);
    }
    for (int half = 0; half < 2; ++half) sums[half] = static_cast<int16_t>(reduce_add(sum[half]));
    *total = *scale * static_cast<float>(sums[0] + sums[1]);
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
                           a.activations.scales + at_group, a.activations.sums + 2 * at_group,
                           a.activations.totals + at_group);
        }
    }
}

template <class Body>
void dispatch_format(const PackedLinear& a, Body&& body) {
#if defined(__AVX512BF16__)
    if (takes_pairs(a)) return body(Bf16Pairs{});
#endif
    switch (a.packing) {
        case Packing::f32: return body(F32{});
        case Packing::bf16: return body(Half<Bf16Pair>{});
        case Packing::f16: return body(Half<F16Pair>{});
        case Packing::int8: return body(Int8{});
        case Packing::int4:
        case Packing::q4_k: return body(Nested<4>{});
        case Packing::q5_k: return body(Nested<5>{});
        case Packing::q4_0: return body(Affine<4, Centered<4>>{});
        case Packing::q5_0: return body(Affine<5, Centered<5>>{});
        case Packing::q4_1: return body(Affine<4, Shifted>{});
        case Packing::q5_1: return body(Affine<5, Shifted>{});
        case Packing::q6_k: return body(Q6K{});
    }
}

// ---- whole blocks

template <class T>
void store_lanes(const PackedLinear& a, int64_t row, int64_t first, int v, vf sum) {
    int64_t lane = first + v * kWidth, count = std::clamp<int64_t>(a.out - lane, 0, kWidth);
    if (count == 0) return;
    sum = finish(a, lane, static_cast<int>(count), sum);
    put(static_cast<T*>(a.y) + row * a.out + lane, sum, static_cast<int>(count));
}

// Columns [block * kLanes, ...) of the rows row .. row + R of y.
template <class Format, int R>
void multiply_block(const PackedLinear& a, int64_t block, int64_t row) {
    const PackingSize& size = size_of(a.packing);
    const int64_t groups = group_count(a.in);
    const uint8_t* p = a.weight + block * block_bytes(a.packing, a.in);
    typename Format::Row x[R];
    for (int r = 0; r < R; ++r) x[r] = typename Format::Row(a, row + r);
    typename Format::template Sum<R> sum[kVectors][R]{};
    for (int64_t g = 0; g < groups;) {
        const uint8_t* header = p;
        p += size.header;
        for (int64_t end = std::min(g + size.span, groups); g < end; ++g, p += size.group) {
            for (int64_t line = 0; line < size.group; line += 64)
                __builtin_prefetch(p + kAhead + line);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) Format::add(sum[v], header, p, v, x, g);
        }
        for (int v = 0; v < kVectors; ++v) {
            for (int r = 0; r < R; ++r) sum[v][r].end(header, v);
        }
    }
    for (int v = 0; v < kVectors; ++v) {
        for (int r = 0; r < R; ++r) {
            dispatch(a.dtype, [&](auto t) {
                store_lanes<decltype(t)>(a, row + r, block * kLanes, v, sum[v][r].total);
            });
        }
    }
}

// The rows from `row` on, as many at a time as there are: up to 4, or R = 8.
template <class Format, int R = kRows>
void multiply_rows(const PackedLinear& a, int64_t block, int64_t row, int64_t end) {
    for (; row + R <= end; row += R) multiply_block<Format, R>(a, block, row);
    if constexpr (R > 1) multiply_rows<Format, R == 8 ? 4 : R - 1>(a, block, row, end);
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
