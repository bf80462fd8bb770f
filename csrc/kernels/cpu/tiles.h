// Register tiles, shared by kernels that multiply matrices: operand formats, the
// micro-kernel, packing, scratch.
//
// Every product here is C[rows, columns] += A[rows, steps] B[steps, columns] on kTileRows x (NV
// vectors) register tiles: each step broadcasts kTileRows words of A and multiplies them with NV
// vectors of B. A word is one f32, or, where the CPU multiplies bf16, a pair of bf16 that are
// neighbors along the summed dimension: one step then sums two.
#pragma once

#include <cstdlib>
#include <new>

#include "simd/vec.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

// 8 x 3 accumulators fill AVX-512's 32 registers, 4 x 3 the 16 of the others.
constexpr int kTileRows = kWidth == 16 ? 8 : 4;
constexpr int kTileVectors = 3;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// ---- words

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
        return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                     reinterpret_cast<__m512bh>(a),
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

// ---- tiles

// Calls body(r, n) for every vector of a tile, unrolled: an index that is no constant would move
// the tile to memory.
template <int NV, int R = kTileRows, class Body>
inline __attribute__((always_inline)) void for_tile(Body&& body) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
        for (int n = 0; n < NV; ++n) body(r, n);
    }
}

template <int NV>
using Tile = vf[kTileRows][NV];

template <int NV>
inline __attribute__((always_inline)) void load_tile(Tile<NV>& tile, const float* from,
                                                     int64_t stride) {
    for_tile<NV>([&](int r, int n) { tile[r][n] = load(from + r * stride + n * kWidth); });
}
template <int NV>
inline __attribute__((always_inline)) void store_tile(const Tile<NV>& tile, float* to,
                                                      int64_t stride) {
    for_tile<NV>([&](int r, int n) { store(to + r * stride + n * kWidth, tile[r][n]); });
}

// tile[r][n] += sum over steps of a[step, r] * b[step, n]. A row of `a` is kRowStride words after
// the one before it, a step a_step words after the one before it; b's steps are b_step words apart.
template <class E, int kRowStride, int R, int NV>
inline __attribute__((always_inline)) void multiply_add(vf (&tile)[R][NV], const Word* a,
                                                        int64_t a_step, const Word* b,
                                                        int64_t b_step, int64_t steps) {
    for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step) {
        vf column[NV], row{};
#pragma GCC unroll 3
        for (int n = 0; n < NV; ++n) column[n] = load_words(b + n * kWidth);
        for_tile<NV, R>([&](int r, int n) {
            if (n == 0) row = E::broadcast(a + r * kRowStride);
            tile[r][n] = E::multiply_add(row, column[n], tile[r][n]);
        });
    }
}

// ---- packing

// dst[c][r] = src[r][c]; rows and columns are multiples of 4.
inline void transpose(const Word* src, int64_t src_stride, Word* dst, int64_t dst_stride,
                      int64_t rows, int64_t columns) {
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

// Packs the rows row_at(0 .. rows) of `size` elements so that they become columns: dst[step][r],
// with `width` >= rows columns (a multiple of 4, zeros past rows) and steps as `row_words` counts
// them. `room` holds width * kMaxSize words.
constexpr int64_t kMaxSize = 256;
template <class E>
constexpr int64_t row_words(int64_t size) {
    return round_up((size + E::kElements - 1) / E::kElements, 4);
}
template <class E, class RowAt>
void pack_columns(RowAt&& row_at, int64_t rows, int64_t width, int64_t size, Word* room,
                  Word* dst) {
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

// Packs rows in tiles [tile][step][kTileRows], the broadcast side of a product that sums over the
// rows' elements.
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
        for (int64_t r = 0; r < rows; ++r)
            widen_row(row_at(r), as_floats(dst + r * columns), size, columns);
    } else {
        for (int64_t r = 0; r < rows; r += 2) {
            const bf16 *low = row_at(r), *high = r + 1 < rows ? row_at(r + 1) : nullptr;
            Word* to = dst + r / 2 * columns;
            if (high) {
                for (int64_t d = 0; d < size; ++d)
                    to[d] = low[d].bits | static_cast<Word>(high[d].bits) << 16;
            } else {
                for (int64_t d = 0; d < size; ++d) to[d] = low[d].bits;
            }
            for (int64_t d = size; d < columns; ++d) to[d] = 0;
        }
    }
}

// ---- memory

// A thread's scratch: aligned; not initialized.
template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t size)
        : data_(static_cast<T*>(
              std::aligned_alloc(64, round_up(size * static_cast<int64_t>(sizeof(T)) + 1, 64)))) {
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
