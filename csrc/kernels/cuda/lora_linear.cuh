// The three products run on tiles of 32 x 32 results in float32, which 32 terms at a time are added
// to, in order. Blocks are 128 threads with 2 x 4 results each.
#pragma once

#include "kernels/cpu/lora_linear.h"
#include "kernels/cuda/device.cuh"

namespace mllama::cuda {

constexpr int kTile = 32, kTileThreads = 128, kDotWarps = 8;
constexpr int64_t kFewRows = 32;  // for which low_rank_down gives each result a warp

// ---- dropout

MLLAMA_DEVICE uint32_t mix(uint32_t h) {
    h ^= h >> 16;
    h *= 0x21f0aaadu;
    h ^= h >> 15;
    h *= 0x735a2d97u;
    return h ^ (h >> 15);
}

// The elements of one row that dropout keeps, as `keep_mask` of ops/lora_linear.py.
struct KeepMask {
    MLLAMA_DEVICE KeepMask(const kernels::LowRank& a, const int64_t* seed, int64_t row)
        : threshold(a.threshold) {
        uint32_t low = static_cast<uint32_t>(*seed), high = static_cast<uint32_t>(*seed >> 32);
        key = mix(static_cast<uint32_t>(row) ^ mix(low ^ mix(high)));
        shift = mix(key ^ mix(high ^ 0x9e3779b9u));
    }
    MLLAMA_DEVICE bool operator()(int64_t column) const {
        return mix(static_cast<uint32_t>(column) ^ key) + shift >= threshold;
    }

    uint32_t threshold, key, shift;
};

// ---- operands, 0 outside of them

template <class T, class W>
struct LowRankOperands {
    const kernels::LowRank& a;
    const int64_t* seed;

    // dropout(x)
    MLLAMA_DEVICE float x(int64_t row, int64_t column) const {
        if (row >= a.rows || column >= a.width) return 0;
        if (a.dropout && !KeepMask(a, seed, row)(column)) return 0;
        return to_float(static_cast<const T*>(a.x)[row * a.width + column]);
    }
    MLLAMA_DEVICE int64_t factor_place(int64_t c, int64_t column) const {
        return a.by_column ? column * a.rank + c : c * a.width + column;
    }
    MLLAMA_DEVICE float factor(int64_t c, int64_t column) const {
        if (c >= a.rank || column >= a.width) return 0;
        return to_float(static_cast<const W*>(a.factor)[factor_place(c, column)]);
    }
    MLLAMA_DEVICE float small(int64_t row, int64_t c) const {
        return row < a.rows && c < a.rank ? a.small[row * a.stride + c] : 0;
    }
};

// Neighboring threads load neighbors in memory: along the tile's rows (columns) or along the terms.
enum class Neighbors { in_tile, in_terms };

using TileTerms =
    Array<float, kTile*(kTile + 1)>;  // [term][row or column]; rows of 33 spread banks

template <class At>
MLLAMA_DEVICE void load_terms(TileTerms& to, Neighbors neighbors, At&& at) {
    // More at a time would spill registers.
    MLLAMA_UNROLL_2 for (int e = threadIdx.x; e < kTile * kTile; e += kTileThreads) {
        int fast = e % kTile, slow = e / kTile;
        int place = neighbors == Neighbors::in_tile ? fast : slow;
        int term = neighbors == Neighbors::in_tile ? slow : fast;
        to[term * (kTile + 1) + place] = at(place, term);
    }
}

// Calls done(row, column, sum) with the sums over `terms` of left(row, term) * right(column, term)
// for the rows and columns of a tile.
template <class Left, class Right, class Done>
MLLAMA_DEVICE void multiply_tile(int64_t terms, Neighbors left_neighbors, Left&& left,
                                 Neighbors right_neighbors, Right&& right, Done&& done) {
    MLLAMA_SHARED(TileTerms, a);
    MLLAMA_SHARED(TileTerms, b);
    int row = threadIdx.x / 8 * 2, column = threadIdx.x % 8 * 4;
    float sums[2][4] = {};
    for (int64_t first = 0; first < terms; first += kTile) {
        __syncthreads();  // the last use of both is over
        load_terms(a, left_neighbors, [&](int i, int k) { return left(i, first + k); });
        load_terms(b, right_neighbors, [&](int i, int k) { return right(i, first + k); });
        __syncthreads();
        MLLAMA_UNROLL for (int k = 0; k < kTile; ++k) {
            const int at = k * (kTile + 1);
            MLLAMA_UNROLL for (int i = 0; i < 2; ++i) {
                MLLAMA_UNROLL for (int j = 0; j < 4; ++j) {
                    sums[i][j] += a[at + row + i] * b[at + column + j];
                }
            }
        }
    }
    MLLAMA_UNROLL for (int i = 0; i < 2; ++i) {
        MLLAMA_UNROLL for (int j = 0; j < 4; ++j) done(row + i, column + j, sums[i][j]);
    }
}

// ---- the products

// Tiles of small: rows by ranks, in blockIdx.x and .y.
template <class T, class W>
__global__ void __launch_bounds__(kTileThreads)
    low_rank_down(kernels::LowRank a, const int64_t* seed) {
    LowRankOperands<T, W> o{a, seed};
    int64_t row = int64_t{blockIdx.x} * kTile, rank = int64_t{blockIdx.y} * kTile;
    multiply_tile(
        a.width, Neighbors::in_terms, [&](int i, int64_t k) { return o.x(row + i, k); },
        a.by_column ? Neighbors::in_tile : Neighbors::in_terms,
        [&](int i, int64_t k) { return o.factor(rank + i, k); },
        [&](int i, int j, float sum) {
            if (row + i < a.rows && rank + j < a.rank)
                a.small[(row + i) * a.stride + rank + j] = a.scale * sum;
        });
}

// The same for few rows.
template <class T, class W>
__global__ void __launch_bounds__(32 * kDotWarps)
    low_rank_dots(kernels::LowRank a, const int64_t* seed) {
    LowRankOperands<T, W> o{a, seed};
    int64_t i = int64_t{blockIdx.x} * kDotWarps + threadIdx.x / 32;
    for (; i < a.rows * a.rank; i += int64_t{gridDim.x} * kDotWarps) {
        int64_t row = i / a.rank, c = i % a.rank;
        float sum = 0;
        for (int64_t k = threadIdx.x % 32; k < a.width; k += 32)
            sum += o.x(row, k) * o.factor(c, k);
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) a.small[row * a.stride + c] = a.scale * sum;
    }
}

// Tiles of x: rows by columns.
template <class T, class W>
__global__ void __launch_bounds__(kTileThreads)
    low_rank_up(kernels::LowRank a, const int64_t* seed) {
    LowRankOperands<T, W> o{a, seed};
    int64_t row = int64_t{blockIdx.x} * kTile, column = int64_t{blockIdx.y} * kTile;
    multiply_tile(
        a.rank, Neighbors::in_terms, [&](int i, int64_t k) { return o.small(row + i, k); },
        a.by_column ? Neighbors::in_terms : Neighbors::in_tile,
        [&](int i, int64_t k) { return o.factor(k, column + i); },
        [&](int i, int j, float sum) {
            int64_t r = row + i, c = column + j;
            if (r >= a.rows || c >= a.width) return;
            if (a.dropout && !KeepMask(a, seed, r)(c)) return;
            T& x = static_cast<T*>(a.x)[r * a.width + c];
            x = from_float<T>(to_float(x) + a.scale * sum);
        });
}

// Tiles of the factor: columns by ranks.
template <class T, class W>
__global__ void __launch_bounds__(kTileThreads)
    low_rank_outer(kernels::LowRank a, const int64_t* seed) {
    LowRankOperands<T, W> o{a, seed};
    int64_t column = int64_t{blockIdx.x} * kTile, rank = int64_t{blockIdx.y} * kTile;
    multiply_tile(
        a.rows, Neighbors::in_tile, [&](int i, int64_t k) { return o.x(k, column + i); },
        Neighbors::in_tile, [&](int i, int64_t k) { return o.small(k, rank + i); },
        [&](int i, int j, float sum) {
            if (column + i < a.width && rank + j < a.rank)
                static_cast<W*>(a.factor)[o.factor_place(rank + j, column + i)] =
                    from_float<W>(a.scale * sum);
        });
}

}  // namespace mllama::cuda
