// Tiles of q, k and v in shared memory, and their products, by one warp each.
//
// A tile of results, 16 rows by 8 N columns, is float[N][4] in every lane: of each 8 columns, lane
// 4 g + t has columns 2 t and 2 t + 1 of row g (elements 0 and 1) and of row g + 8 (2 and 3), as
// tensor cores have it.
#pragma once

#include <climits>

#include "kernels/cuda/attention_visible.cuh"
#include "kernels/cuda/quantized_rows.cuh"

namespace mllama::cuda {

// Row and column of element j of the n-th 8 columns.
MLLAMA_DEVICE int tile_row(int j) { return static_cast<int>(threadIdx.x) % 32 / 4 + j / 2 * 8; }
MLLAMA_DEVICE int tile_column(int n, int j) {
    return n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + j % 2;
}

// Rows of kSize f16 or bf16, multiplied by tensor cores. Rows are padded by 16 bytes, so that the
// eight rows of a matrix lie in different banks.
template <class T, int kSize_, bool kTuring_>
struct TensorTiles {
    using Element = T;
    static constexpr int kSize = kSize_, kStride = kSize + 8;
    static constexpr bool kTuring = kTuring_;
    static constexpr int kMostColumns = 64;  // of a warp's scores
    static constexpr int kDepth = 16;        // of products: rows of b in multiply_columns
    static_assert(!kTuring || std::is_same_v<T, f16>);

    // sums += a b' for 16 rows of a, 8 N rows of b.
    template <int N>
    MLLAMA_DEVICE static void multiply_rows(float (&sums)[N][4], const T* a, const T* b) {
        int lane = threadIdx.x % 32;
        a += lane % 16 * kStride + lane / 16 * 8;
        b += (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
        MLLAMA_UNROLL for (int c = 0; c < kSize; c += 16) {
            uint32_t left[4], right[4];
            ldmatrix(left, a + c);
            MLLAMA_UNROLL for (int n = 0; n < N; n += 2) {
                ldmatrix(right, b + n * 8 * kStride + c);
                multiply(sums[n], left, {right[0], right[1]});
                multiply(sums[n + 1], left, {right[2], right[3]});
            }
        }
    }
    // sums += p b for 8 N rows of b and its first kColumns columns.
    template <int kColumns, int N>
    MLLAMA_DEVICE static void multiply_columns(float (&sums)[kColumns / 8][4],
                                               const float (&p)[N][4], const T* b) {
        int lane = threadIdx.x % 32;
        b += lane % 16 * kStride + lane / 16 * 8;
        MLLAMA_UNROLL for (int n = 0; n < N; n += 2) {
            uint32_t left[4] = {pack<T>(p[n][0], p[n][1]), pack<T>(p[n][2], p[n][3]),
                                pack<T>(p[n + 1][0], p[n + 1][1]),
                                pack<T>(p[n + 1][2], p[n + 1][3])},
                     right[4];
            MLLAMA_UNROLL for (int c = 0; c < kColumns / 8; c += 2) {
                ldmatrix_transposed(right, b + n * 8 * kStride + c * 8);
                multiply(sums[c], left, {right[0], right[1]});
                multiply(sums[c + 1], left, {right[2], right[3]});
            }
        }
    }

  private:
    MLLAMA_DEVICE static void multiply(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
        if constexpr (kTuring) {
            mma_8(d, {a[0], a[1]}, b[0]);
            mma_8(d, {a[2], a[3]}, b[1]);
        } else {
            mma_16<T>(d, a, b);
        }
    }
};

// Rows of kSize elements of any type, multiplied in float32: f32, and bf16 where tensor cores do
// not take it.
template <class T, int kSize_, bool kTuring_>
struct FloatTiles {
    using Element = T;
    static constexpr int kSize = kSize_, kStride = kSize + 16 / static_cast<int>(sizeof(T));
    static constexpr bool kTuring = kTuring_;
    static constexpr int kMostColumns = 32, kDepth = 8;

    template <int N>
    MLLAMA_DEVICE static void multiply_rows(float (&sums)[N][4], const T* a, const T* b) {
        a += tile_row(0) * kStride;
        b += tile_column(0, 0) * kStride;
        for (int c = 0; c < kSize; c += 4) {
            float x[4], y[4], z[4];
            load(x, a + c);
            load(y, a + 8 * kStride + c);
            MLLAMA_UNROLL for (int n = 0; n < N; ++n) {
                MLLAMA_UNROLL for (int j = 0; j < 2; ++j) {
                    load(z, b + (n * 8 + j) * kStride + c);
                    MLLAMA_UNROLL for (int i = 0; i < 4; ++i) {
                        sums[n][j] += x[i] * z[i];
                        sums[n][2 + j] += y[i] * z[i];
                    }
                }
            }
        }
    }
    template <int kColumns, int N>
    MLLAMA_DEVICE static void multiply_columns(float (&sums)[kColumns / 8][4],
                                               const float (&p)[N][4], const T* b) {
        int quad = threadIdx.x % 32 / 4 * 4;
        b += tile_column(0, 0);
        MLLAMA_UNROLL for (int n = 0; n < N; ++n) {
            MLLAMA_UNROLL for (int k = 0; k < 8; ++k) {
                float x = __shfl_sync(kAllLanes, p[n][k % 2], quad + k / 2),
                      y = __shfl_sync(kAllLanes, p[n][2 + k % 2], quad + k / 2), z[2];
                MLLAMA_UNROLL for (int c = 0; c < kColumns / 8; ++c) {
                    load(z, b + (n * 8 + k) * kStride + c * 8);
                    MLLAMA_UNROLL for (int j = 0; j < 2; ++j) {
                        sums[c][j] += x * z[j];
                        sums[c][2 + j] += y * z[j];
                    }
                }
            }
        }
    }
};

// ---- from global to shared memory

template <class T>
struct KeyRows {  // of k or v, by key
    static constexpr bool kInPlace = true;
    const T* base;
    int64_t stride;
    MLLAMA_DEVICE KeyRows(const kernels::Heads& t, int64_t batch, int kv_head, int = 0)
        : base(static_cast<const T*>(t.data) + batch * t.batch + kv_head * t.head),
          stride(t.length) {}
    MLLAMA_DEVICE const T* operator()(int key) const { return base + key * stride; }
};

// Codes, and scales behind them.
struct QuantizedKeyRows {
    static constexpr bool kInPlace = false;
    struct Row {
        const int8_t* codes;
        int size;
        MLLAMA_DEVICE float operator[](int d) const { return dequantized(codes, size, d); }
    };
    KeyRows<int8_t> rows;
    int size;
    bool in_words;  // whether four codes can be loaded at a time
    MLLAMA_DEVICE QuantizedKeyRows(const kernels::Heads& t, int64_t batch, int kv_head, int size)
        : rows(t, batch, kv_head, size),
          size(size),
          in_words((reinterpret_cast<uintptr_t>(rows.base) | rows.stride | size) % 4 == 0) {}
    MLLAMA_DEVICE Row operator()(int key) const { return {rows(key), size}; }
};

template <class T>
struct QueryRows {  // of q or grad_out, by row of the group
    static constexpr bool kInPlace = true;
    const T* base;
    int64_t query_stride, head_stride;
    int group_size;
    MLLAMA_DEVICE QueryRows(const kernels::Heads& t, int64_t batch, int kv_head, int group_size)
        : base(static_cast<const T*>(t.data) + batch * t.batch +
               int64_t{kv_head} * group_size * t.head),
          query_stride(t.length),
          head_stride(t.head),
          group_size(group_size) {}
    MLLAMA_DEVICE const T* operator()(int row) const {
        return base + row / group_size * query_stride + row % group_size * head_stride;
    }
};

// Starts the copy of kRows rows from `first` on, zeros from `last` on and behind `size` elements.
// The caller commits and waits.
template <class Tiles, int kRows, int kThreads, class Rows>
MLLAMA_DEVICE void fetch(typename Tiles::Element* tile, const Rows& rows, int first, int last,
                         int size, bool aligned) {
    using T = typename Tiles::Element;
    constexpr int kPiece = kVector<T>, kPieces = Tiles::kSize / kPiece;
    if constexpr (Rows::kInPlace) {
        if (aligned) {
            for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
                int row = i / kPieces, d = i % kPieces * kPiece;
                bool valid = first + row < last && d < size;
                copy_async(tile + row * Tiles::kStride + d,
                           valid ? rows(first + row) + d : rows.base, valid);
            }
            return;
        }
    } else if (rows.in_words) {
        static_assert(std::is_same_v<T, float>);
        // More at once would spill registers where heads are large.
        MLLAMA_UNROLL_2 for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
            int row = i / kPieces, d = i % kPieces * kPiece;
            float v[kPiece] = {};
            if (first + row < last && d < size)
                dequantize_four(v, rows(first + row).codes, size, d);
            store(tile + row * Tiles::kStride + d, v);
        }
        return;
    }
    for (int i = threadIdx.x; i < kRows * Tiles::kSize; i += kThreads) {
        int row = i / Tiles::kSize, d = i % Tiles::kSize;
        bool valid = first + row < last && d < size;
        tile[row * Tiles::kStride + d] = valid ? rows(first + row)[d] : T{};
    }
}

// ---- the work of a block

// How many blocks of up to 128 threads a multiprocessor shall have registers for: with 3 a thread
// has 168, enough for heads up to kThree, with 2 it has 255. On sm_75 shared memory is the limit.
template <class Tiles, int kThree>
constexpr int kBlocksAtOnce = Tiles::kTuring           ? 1
                              : Tiles::kSize <= kThree ? 3
                                                       : 2;

// Blocks go through tiles first, then parts, then groups. Tiles are counted from the last: with a
// causal limit it takes longest.
struct BlockPlace {
    int tile, part, kv_head;
    int64_t batch;
    MLLAMA_DEVICE BlockPlace(int tiles, int parts, int kv_heads) {
        unsigned i = blockIdx.x;
        tile = tiles - 1 - static_cast<int>(i % tiles);
        i /= tiles;
        part = i % parts;
        i /= parts;
        kv_head = i % kv_heads;
        batch = i / kv_heads;
    }
};

// Where a row of the group is in [batch, queries, heads] and in [batch, heads, queries].
struct RowPlace {
    int64_t by_query, by_head;
    MLLAMA_DEVICE RowPlace(const Attention& a, const BlockPlace& place, int row) {
        int query = row / a.group_size, head = place.kv_head * a.group_size + row % a.group_size;
        by_query = (place.batch * a.queries + query) * a.heads + head;
        by_head = (place.batch * a.heads + head) * a.queries + query;
    }
};

// Stores a row's columns of a tile, scaled: those of row g or, with h = 1, g + 8.
template <class T, int N>
MLLAMA_DEVICE void store_row(T* to, const float (&tile)[N][4], int h, int size, float scale) {
    MLLAMA_UNROLL for (int n = 0; n < N; ++n) {
        int d = tile_column(n, 0);
        float pair[2] = {tile[n][2 * h] * scale, tile[n][2 * h + 1] * scale};
        if (size % 2 == 0) {
            if (d < size) store(to + d, pair);
        } else {
            if (d < size) to[d] = from_float<T>(pair[0]);
            if (d + 1 < size) to[d + 1] = from_float<T>(pair[1]);
        }
    }
}

// ---- choices of the host

// Bytes of shared memory that a block may take: sm_75 has no more, later ones then run several
// blocks.
template <bool kTuring>
constexpr int kTileBytes = kTuring ? 62 << 10 : 70 << 10;

// The first of some shapes, best first, that fits the shared memory.
template <class... Shapes>
struct FirstFitting;
template <class Shape, class... Others>
struct FirstFitting<Shape, Others...>
    : std::conditional_t<Shape::kFits, std::type_identity<Shape>, FirstFitting<Others...>> {};

// Calls run(std::type_identity<Tiles>) with the tiles for the arguments on this device.
template <int kSize, class Run>
void choose_tiles(Dtype dtype, Run&& run) {
    bool turing = architecture() < 80;
    switch (dtype) {
        case Dtype::f32:
            turing ? run(std::type_identity<FloatTiles<float, kSize, true>>{})
                   : run(std::type_identity<FloatTiles<float, kSize, false>>{});
            break;
        case Dtype::bf16:
            turing ? run(std::type_identity<FloatTiles<bf16, kSize, true>>{})
                   : run(std::type_identity<TensorTiles<bf16, kSize, false>>{});
            break;
        case Dtype::f16:
            turing ? run(std::type_identity<TensorTiles<f16, kSize, true>>{})
                   : run(std::type_identity<TensorTiles<f16, kSize, false>>{});
            break;
    }
}
template <class Run>
void choose_tiles(const Attention& a, Run&& run) {
    if (a.size <= 64) return choose_tiles<64>(a.dtype, run);
    if (a.size <= 80) return choose_tiles<80>(a.dtype, run);
    if (a.size <= 128) return choose_tiles<128>(a.dtype, run);
    choose_tiles<256>(a.dtype, run);
}

}  // namespace mllama::cuda
