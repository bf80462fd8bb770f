// What the attention kernels share: operand formats, packing, the matrix micro-kernel, 2^x.
//
// Every product here is C[rows, columns] += A[rows, steps] B[steps, columns] on kTileRows x (NV vectors) register
// tiles: each step broadcasts kTileRows words of A and multiplies them with NV vectors of B. A word is one f32, or,
// where the CPU multiplies bf16, a pair of bf16 that are neighbours along the summed dimension: one step then sums two.
//
// Scores are held transposed, [keys, queries]: queries are the lanes of vectors. The softmax over keys then needs no
// horizontal sums, and K and V are always the broadcast side, which takes them nearly as they lie in memory.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "kernels/cpu/attention.h"
#include "simd/vec.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

// 8 x 3 accumulators fill AVX-512's 32 registers, 4 x 3 the 16 of the others.
constexpr int kTileRows = kWidth == 16 ? 8 : 4;
constexpr int kTileVectors = 3;
constexpr int kLanes = kTileVectors * kWidth;  // rows of a group in a tile
static_assert(kLanes <= kMostTileRows);
constexpr float kLog2e = 1.44269504f, kInfinity = __builtin_inff();

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// ---- words ---------------------------------------------------------------------------------------------------------

using Word = uint32_t;

struct F32Words {  // a word is one f32
    static constexpr int kElements = 1;
    static vf broadcast(const void* a) {
        float x;
        std::memcpy(&x, a, sizeof x);
        return splat(x);
    }
    static vf multiply_add(vf a, vf b, vf sum) { return a * b + sum; }
};
template <class T>
struct WordsOf {
    using type = F32Words;
};

#if defined(__AVX512BF16__)
struct Bf16Words {  // a word is two bf16, the one that comes first in the low half
    static constexpr int kElements = 2;
    static vf broadcast(const void* a) {
        int x;
        std::memcpy(&x, a, sizeof x);
        return reinterpret_cast<vf>(_mm512_set1_epi32(x));
    }
    static vf multiply_add(vf a, vf b, vf sum) {
        return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                     reinterpret_cast<__m512bh>(b)));
    }
};
template <>
struct WordsOf<bf16> {
    using type = Bf16Words;
};
#endif

// Two vectors as words of bf16, lane by lane, rounded (ties away from zero).
inline vf join_bf16(vf low, vf high) {
    return as_float(((as_bits(low) + 0x8000u) >> 16) | ((as_bits(high) + 0x8000u) & 0xffff0000u));
}

inline vf load_words(const Word* p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline Word* as_words(float* p) { return reinterpret_cast<Word*>(p); }
inline float* as_floats(Word* p) { return reinterpret_cast<float*>(p); }
inline void store_words(Word* p, vf x) { std::memcpy(p, &x, sizeof x); }

// ---- tiles ---------------------------------------------------------------------------------------------------------

// Calls body(r, n) for every vector of a tile, unrolled: an index that is no constant would move the tile to memory.
template <int NV, class Body>
inline __attribute__((always_inline)) void for_tile(Body&& body) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
        for (int n = 0; n < NV; ++n) body(r, n);
    }
}

template <int NV>
using Tile = vf[kTileRows][NV];

template <int NV>
inline __attribute__((always_inline)) void load_tile(Tile<NV>& tile, const float* from, int64_t stride) {
    for_tile<NV>([&](int r, int n) { tile[r][n] = load(from + r * stride + n * kWidth); });
}
template <int NV>
inline __attribute__((always_inline)) void store_tile(const Tile<NV>& tile, float* to, int64_t stride) {
    for_tile<NV>([&](int r, int n) { store(to + r * stride + n * kWidth, tile[r][n]); });
}

// tile[r][n] += sum over steps of a[step, r] * b[step, n]. A row of `a` is kRowStride words after the one before it, a
// step a_step words after the one before it; b's steps are b_step words apart.
template <class E, int kRowStride, int NV>
inline __attribute__((always_inline)) void multiply_add(Tile<NV>& tile, const Word* a, int64_t a_step, const Word* b,
                                                        int64_t b_step, int64_t steps) {
    for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step) {
        vf column[NV], row{};
#pragma GCC unroll 3
        for (int n = 0; n < NV; ++n) column[n] = load_words(b + n * kWidth);
        for_tile<NV>([&](int r, int n) {
            if (n == 0) row = E::broadcast(a + r * kRowStride);
            tile[r][n] = E::multiply_add(row, column[n], tile[r][n]);
        });
    }
}

// ---- packing -------------------------------------------------------------------------------------------------------

// dst[c][r] = src[r][c]; rows and columns are multiples of 4.
inline void transpose(const Word* src, int64_t src_stride, Word* dst, int64_t dst_stride, int64_t rows,
                      int64_t columns) {
    for (int64_t r = 0; r < rows; r += 4) {
        for (int64_t c = 0; c < columns; c += 4) {
            const Word* from = src + r * src_stride + c;
            Word* to = dst + c * dst_stride + r;
#if defined(__x86_64__)
            __m128 x[4];
            for (int i = 0; i < 4; ++i) std::memcpy(&x[i], from + i * src_stride, sizeof x[i]);
            _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
            for (int i = 0; i < 4; ++i) std::memcpy(to + i * dst_stride, &x[i], sizeof x[i]);
#else
            for (int i = 0; i < 4; ++i) {
                for (int j = 0; j < 4; ++j) to[j * dst_stride + i] = from[i * src_stride + j];
            }
#endif
        }
    }
}

// `size` elements as f32, then zeros up to `width`, a multiple of kWidth.
template <class T>
void widen_row(const T* row, float* to, int64_t size, int64_t width) {
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) store(to + i, load(row + i));
    if (i < size) store(to + i, load_n(row + i, size - i)), i += kWidth;
    for (; i < width; i += kWidth) store(to + i, vf{});
}

// Packs the rows row_at(0 .. rows) of `size` elements so that they become columns: dst[step][r], with `width` >= rows
// columns (a multiple of 4, zeros past rows) and steps as `row_words` counts them. `room` holds width * kMaxSize words.
constexpr int64_t kMaxSize = 256;
template <class E>
constexpr int64_t row_words(int64_t size) {
    return round_up((size + E::kElements - 1) / E::kElements, 4);
}
template <class E, class RowAt>
void pack_columns(RowAt&& row_at, int64_t rows, int64_t width, int64_t size, Word* room, Word* dst) {
    int64_t words = row_words<E>(size), stride = round_up(words, kWidth);
    for (int64_t r = 0; r < width; ++r) {
        Word* to = room + r * stride;
        if (r >= rows) {
            std::memset(to, 0, stride * sizeof(Word));
        } else if constexpr (E::kElements == 1) {
            widen_row(row_at(r), as_floats(to), size, stride);
        } else {
            std::memcpy(to, row_at(r), size * 2);
            std::memset(reinterpret_cast<char*>(to) + size * 2, 0, words * sizeof(Word) - size * 2);
        }
    }
    transpose(room, stride, dst, width, width, words);
}

// Packs rows in tiles [tile][step][kTileRows], the broadcast side of a product that sums over the rows' elements.
template <class E, class RowAt>
void pack_tiles(RowAt&& row_at, int64_t rows, int64_t size, Word* room, Word* dst) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
        pack_columns<E>([&](int64_t i) { return row_at(r + i); }, rows - r, kTileRows, size, room,
                        dst + r * row_words<E>(size));
    }
}

// Packs rows as they are: dst[row / kElements][columns], with zeros past size and past rows.
template <class E, class RowAt>
void pack_rows(RowAt&& row_at, int64_t rows, int64_t size, int64_t columns, Word* dst) {
    if constexpr (E::kElements == 1) {
        for (int64_t r = 0; r < rows; ++r) widen_row(row_at(r), as_floats(dst + r * columns), size, columns);
    } else {
        for (int64_t r = 0; r < rows; r += 2) {
            const bf16 *low = row_at(r), *high = r + 1 < rows ? row_at(r + 1) : nullptr;
            Word* to = dst + r / 2 * columns;
            if (high) {
                for (int64_t d = 0; d < size; ++d) to[d] = low[d].bits | static_cast<Word>(high[d].bits) << 16;
            } else {
                for (int64_t d = 0; d < size; ++d) to[d] = low[d].bits;
            }
            for (int64_t d = size; d < columns; ++d) to[d] = 0;
        }
    }
}

// ---- numbers -------------------------------------------------------------------------------------------------------

// 2^x for x up to 0 or little above it; 0 below -127. NaN stays NaN. The polynomials (degree 5, minimax) err by 1.5e-7.
inline vf exp2_below(vf x) {
#if defined(__AVX512F__)
    // x = floor(x) + f; scalef multiplies by 2^floor(x), and gives 0 for -inf, where reduce gives f = 0.
    __m512 v = reinterpret_cast<__m512>(x);
    vf f = reinterpret_cast<vf>(_mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    vf p = splat(1.867130087e-3f);
    p = p * f + 9.017030275e-3f;
    p = p * f + 5.579991315e-2f;
    p = p * f + 2.401644501e-1f;
    p = p * f + 6.931513118e-1f;
    p = p * f + 1.0f;
    return reinterpret_cast<vf>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), v));
#else
    vf clamped = x < -127.0f ? splat(-127.0f) : x;
    vf shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold round(x)
    vf f = clamped - (shifted - 12582912.0f);
    vf p = splat(1.326472707e-3f);
    p = p * f + 9.671512649e-3f;
    p = p * f + 5.550733744e-2f;
    p = p * f + 2.402224209e-1f;
    p = p * f + 6.931469776e-1f;
    p = p * f + 1.0f;
    return p * as_float((as_bits(shifted) + 127u) << 23);
#endif
}

// ---- a group -------------------------------------------------------------------------------------------------------

// One group's place in the tensors.
struct Group {
    Group(const Attention& args, int64_t index)
        : a(args), batch(index / a.kv_heads), kv_head(index % a.kv_heads), visible(a.visible[batch]) {
        keys = visible.limit(a.queries - 1) - visible.first;
    }
    int64_t query(int64_t row) const { return row / a.group_size(); }
    int64_t head(int64_t row) const { return kv_head * a.group_size() + row % a.group_size(); }
    // Where a row starts in a contiguous [batch, queries, heads, size], and its place in [batch, heads, queries].
    int64_t element(int64_t row) const { return ((batch * a.queries + query(row)) * a.heads + head(row)) * a.size; }
    int64_t statistic(int64_t row) const { return (batch * a.heads + head(row)) * a.queries + query(row); }
    // How many keys a row sees, counted from visible.first.
    int32_t limit(int64_t row) const { return static_cast<int32_t>(visible.limit(query(row)) - visible.first); }

    // Functions i -> row i of k or v, counted from visible.first, and i -> row first + i of q or what is shaped as q.
    template <class T>
    auto key_rows(const Heads& t) const {
        const T* base = static_cast<const T*>(t.data) + batch * t.batch + visible.first * t.length + kv_head * t.head;
        return [base, stride = t.length](int64_t i) { return base + i * stride; };
    }
    template <class T>
    auto query_rows(const Heads& t, int64_t first) const {
        const T* base = static_cast<const T*>(t.data) + batch * t.batch;
        return [this, base, &t, first](int64_t i) {
            return base + query(first + i) * t.length + head(first + i) * t.head;
        };
    }

    const Attention& a;
    int64_t batch, kv_head;
    VisibleKeys visible;
    int64_t keys;  // that the last query sees, and so all that any does
};

// Calls body(first row, rows, vectors) for every count-th tile of a group, from tile `index` on; vectors of rows, 1 to
// kTileVectors, as std::integral_constant.
template <class Body>
void for_row_tiles(const Attention& a, int64_t index, int64_t count, Body&& body) {
    for (int64_t first = index * kLanes; first < a.rows(); first += count * kLanes) {
        int64_t rows = std::min<int64_t>(kLanes, a.rows() - first);
        switch ((rows + kWidth - 1) / kWidth) {
            case 1: body(first, rows, std::integral_constant<int, 1>{}); break;
            case 2: body(first, rows, std::integral_constant<int, 2>{}); break;
            default: body(first, rows, std::integral_constant<int, 3>{});
        }
    }
}

// How many keys each row of a tile sees; lanes past the last row repeat it. Limits never fall from row to row.
template <int NV>
struct Limits {
    Limits(const Group& group, int64_t first, int64_t rows) {
        int32_t lane[NV * kWidth];
        for (int i = 0; i < NV * kWidth; ++i) lane[i] = group.limit(first + std::min<int64_t>(i, rows - 1));
        std::memcpy(limit, lane, sizeof limit);
        fewest = lane[0];
        most = lane[NV * kWidth - 1];
    }
    // x + added where lanes of vector n see the key, -inf elsewhere. Chosen, not added: what a hidden key holds may be
    // NaN or overflow, and -inf would not cover that.
    vf mask(vf x, int n, int key, float added) const {
        int place = added == -kInfinity ? most : key;  // where no lane sees it
        return vi{} + place < limit[n] ? x + added : splat(-kInfinity);
    }

    vi limit[NV];
    int fewest, most;
};

// ---- memory --------------------------------------------------------------------------------------------------------

// A thread's scratch: aligned; not initialised.
template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t size)
        : data_(static_cast<T*>(std::aligned_alloc(64, round_up(size * static_cast<int64_t>(sizeof(T)) + 1, 64)))) {
        if (!data_) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator T*() const { return data_; }

  private:
    T* data_;
};
using Words = Scratch<Word>;
using Floats = Scratch<float>;

}  // namespace
}  // namespace mllama::kernels::MLLAMA_ISA
