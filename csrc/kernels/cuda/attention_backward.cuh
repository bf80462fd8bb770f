// Gradients. With P = exp(scores - highest) / sum and delta = rowsum(dO * O):
//     dV = P' dO,  dS = P * (dO V' - delta),  dQ = scale * dS K,  dK = scale * dS' Q.
// Scores are computed again, tile by tile, once in blocks that own keys and once in blocks that own
// rows: nothing is added up by several blocks, and the bits are always the same.
#pragma once

#include "kernels/cuda/attention_tiles.cuh"

namespace mllama::cuda {

using kernels::Statistic;

// A block owns 16 keys or 16 rows of a group for each of its warps, and goes through tiles of
// kOther rows or keys. With large heads it has a part of the columns of dK and dV.
template <class Tiles_, bool kOwnsKeys_, int kWarps_, int kOther_>
struct BackwardShape {
    using Tiles = Tiles_;
    static constexpr bool kOwnsKeys = kOwnsKeys_;
    static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps, kOwn = 16 * kWarps;
    static constexpr int kOther = kOther_;
    static constexpr int kColumns = kOwnsKeys && Tiles::kSize > 128 ? 128 : Tiles::kSize;
    static constexpr int kParts = Tiles::kSize / kColumns;
    static constexpr int kBytes =
        2 * (kOwn + kOther) * Tiles::kStride * static_cast<int>(sizeof(typename Tiles::Element));
    // Two results of 128 columns take 128 registers of a thread. In float32 they leave too few for
    // the scores of 16 others.
    static constexpr int kMostOthers = kOwnsKeys && kParts > 1 &&
                                               sizeof(typename Tiles::Element) == 4
                                           ? 8
                                           : 32;
    static constexpr bool kFits = kBytes <= kTileBytes<Tiles::kTuring> &&
                                  kOther % Tiles::kDepth == 0 && kOther <= kMostOthers;
};

// What turns a row's scores into probabilities, and dP into dS.
struct RowNumbers {
    KeyRange keys;  // visible ones
    float highest, inverse, delta;

    MLLAMA_DEVICE static RowNumbers of(const AttentionBackward& a, const BlockPlace& place,
                                       int row) {
        RowNumbers n{{a.keys, 0}, kInfinity, 0, 0};
        if (row >= a.rows) return n;
        int64_t i = RowPlace(a, place, row).by_head;
        n.keys = visible_keys(a, place.batch, row / a.group_size);
        n.delta = a.deltas[i];
        if (Statistic s = a.statistics[i]; s.sum != 0) n.highest = s.highest, n.inverse = 1 / s.sum;
        return n;
    }
    // A product becomes P, a dP becomes dS.
    MLLAMA_DEVICE void apply(float& product, float& gradient, const ScoreScale& scale, int key,
                             float added) const {
        // Selected, not multiplied by 0: a hidden key's score may be NaN.
        bool visible = key >= keys.first && key < keys.last && added != -kInfinity;
        float capped = scale.cap(product), slope = scale.capped ? 1 - capped * capped : 1,
              // Another order of summation can put a score above the highest, by much if scores are
              // huge.
            below = fminf(scale.factor * capped + added - highest, 0);
        product = visible ? fast_exp2(below) * inverse : 0;
        gradient = visible ? product * (gradient - delta) * slope : 0;
    }
};

// What a block knows of the rows and keys whose scores it computes: its own in registers, the other
// tile's in shared memory.
template <class Shape>
struct KeysOwned {
    using Other = RowNumbers;
    int key[2];
    float added[2];

    MLLAMA_DEVICE KeysOwned(const AttentionBackward& a, const BlockPlace& place, int first) {
        MLLAMA_UNROLL for (int h = 0; h < 2; ++h) {
            key[h] = first + tile_row(2 * h);
            added[h] = key[h] < a.keys ? added_score(a, place.batch, key[h]) : -kInfinity;
        }
    }
    // The rows that see any of the block's keys.
    MLLAMA_DEVICE KeyRange others(const AttentionBackward& a, const BlockPlace& place) const {
        KeyRange mine{a.keys, 0};
        MLLAMA_UNROLL for (int h = 0; h < 2; ++h) {
            if (added[h] == -kInfinity) continue;
            mine = {smaller(mine.first, key[h]), larger(mine.last, key[h] + 1)};
        }
        KeyRange own = block_union<Shape::kWarps>(mine);
        mine = {a.queries, 0};
        for (int t = threadIdx.x; t < a.queries; t += Shape::kThreads) {
            KeyRange keys = visible_keys(a, place.batch, t);
            if (keys.first >= own.last || keys.last <= own.first) continue;
            mine = {smaller(mine.first, t), t + 1};
        }
        KeyRange queries = block_union<Shape::kWarps>(mine);
        return {queries.first * a.group_size, queries.last * a.group_size};
    }
    MLLAMA_DEVICE static Other other(const AttentionBackward& a, const BlockPlace& place, int row,
                                     KeyRange) {
        return RowNumbers::of(a, place, row);
    }
    MLLAMA_DEVICE void apply(float& product, float& gradient, const ScoreScale& scale, int j,
                             const Other& row, int) const {
        row.apply(product, gradient, scale, key[j / 2], added[j / 2]);
    }
};

template <class Shape>
struct RowsOwned {
    using Other = float;  // what is added to the key's scores
    RowNumbers row[2];

    MLLAMA_DEVICE RowsOwned(const AttentionBackward& a, const BlockPlace& place, int first) {
        MLLAMA_UNROLL for (int h = 0; h < 2; ++h) {
            row[h] = RowNumbers::of(a, place, first + tile_row(2 * h));
        }
    }
    MLLAMA_DEVICE KeyRange others(const AttentionBackward& a, const BlockPlace& place) const {
        KeyRange mine{smaller(row[0].keys.first, row[1].keys.first),
                      larger(row[0].keys.last, row[1].keys.last)};
        return keys_of_block<Shape::kWarps>(a, place.batch, mine);
    }
    MLLAMA_DEVICE static Other other(const AttentionBackward& a, const BlockPlace& place, int key,
                                     KeyRange keys) {
        return key < keys.last ? added_score(a, place.batch, key) : -kInfinity;
    }
    MLLAMA_DEVICE void apply(float& product, float& gradient, const ScoreScale& scale, int j,
                             Other added, int key) const {
        row[j / 2].apply(product, gradient, scale, key, added);
    }
};

// Adds up a block's gradients: `first` of k or q, `second` of v.
template <class Shape, class Owned, class OwnRows, class OtherRows>
MLLAMA_DEVICE void walk(const AttentionBackward& a, const BlockPlace& place, int own_count,
                        const OwnRows (&own_rows)[2], const OtherRows (&other_rows)[2],
                        float (&first)[Shape::kColumns / 8][4],
                        float (&second)[Shape::kColumns / 8][4]) {
    using Tiles = typename Shape::Tiles;
    using T = typename Tiles::Element;
    using Others = Array<typename Owned::Other, Shape::kOther>;
    constexpr int kStride = Tiles::kStride, kOwn = Shape::kOwn, kOther = Shape::kOther;
    T *own[2] = {dynamic_shared<T>(), dynamic_shared<T>() + kOwn * kStride},
      *other[2] = {own[1] + kOwn * kStride, own[1] + (kOwn + kOther) * kStride};
    MLLAMA_SHARED(Others, numbers);

    const int tile_first = place.tile * kOwn, warp_first = threadIdx.x / 32 * 16;
    const bool has_own = tile_first + warp_first < own_count;
    const Owned owned(a, place, tile_first + warp_first);
    const KeyRange range = owned.others(a, place);
    if (range.first >= range.last) return;
    const ScoreScale scale(a);
    auto describe = [&](int from) {
        for (int i = threadIdx.x; i < kOther; i += Shape::kThreads) {
            numbers[i] = Owned::other(a, place, from + i, range);
        }
    };
    auto fetch_other = [&](int i, int from) {
        if (from < range.last) {
            fetch<Tiles, kOther, Shape::kThreads>(other[i], other_rows[i], from, range.last, a.size,
                                                  a.aligned);
        }
        commit_copies();
    };

    MLLAMA_UNROLL for (int i = 0; i < 2; ++i) {
        fetch<Tiles, kOwn, Shape::kThreads>(own[i], own_rows[i], tile_first, own_count, a.size,
                                            a.aligned);
        fetch_other(i, range.first);
    }
    describe(range.first);
    for (int from = range.first; from < range.last; from += kOther) {
        float p[kOther / 8][4] = {}, ds[kOther / 8][4] = {};
        wait_for_copies<1>();
        __syncthreads();
        if (has_own) Tiles::multiply_rows(p, own[0] + warp_first * kStride, other[0]);
        wait_for_copies<0>();
        __syncthreads();
        const int column = place.part * Shape::kColumns;
        if (has_own) {
            Tiles::multiply_rows(ds, own[1] + warp_first * kStride, other[1]);
            MLLAMA_UNROLL for (int n = 0; n < kOther / 8; ++n) {
                MLLAMA_UNROLL for (int j = 0; j < 4; ++j) {
                    int i = tile_column(n, j);
                    owned.apply(p[n][j], ds[n][j], scale, j, numbers[i], from + i);
                }
            }
            Tiles::template multiply_columns<Shape::kColumns>(first, ds, other[0] + column);
        }
        __syncthreads();
        fetch_other(0, from + kOther);
        if (from + kOther < range.last) describe(from + kOther);
        if constexpr (Shape::kOwnsKeys) {
            if (has_own) {
                Tiles::template multiply_columns<Shape::kColumns>(second, p, other[1] + column);
            }
            __syncthreads();
        }
        fetch_other(1, from + kOther);
    }
}

// The gradients of k and v.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, kBlocksAtOnce<typename Shape::Tiles, 0>)
    attention_key_gradients(AttentionBackward a) {
    using T = typename Shape::Tiles::Element;
    if constexpr (!kRunsHere<Shape::Tiles::kTuring>) return trap("made for another device");
    const BlockPlace place((a.keys + Shape::kOwn - 1) / Shape::kOwn, Shape::kParts, a.kv_heads);
    const KeyRows<T> own[2] = {{a.k, place.batch, place.kv_head},
                               {a.v, place.batch, place.kv_head}};
    const QueryRows<T> others[2] = {{a.q, place.batch, place.kv_head, a.group_size},
                                    {a.grad_out, place.batch, place.kv_head, a.group_size}};
    float grad_k[Shape::kColumns / 8][4] = {}, grad_v[Shape::kColumns / 8][4] = {};
    walk<Shape, KeysOwned<Shape>>(a, place, a.keys, own, others, grad_k, grad_v);

    const int first = place.tile * Shape::kOwn + threadIdx.x / 32 * 16,
              column = place.part * Shape::kColumns;
    MLLAMA_UNROLL for (int h = 0; h < 2; ++h) {
        int key = first + tile_row(2 * h);
        if (key >= a.keys) continue;
        int64_t at = ((place.batch * a.keys + key) * a.kv_heads + place.kv_head) * a.size + column;
        store_row(static_cast<T*>(a.grad_k) + at, grad_k, h, a.size - column, a.scale);
        store_row(static_cast<T*>(a.grad_v) + at, grad_v, h, a.size - column, 1);
    }
}

// The gradient of q.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, kBlocksAtOnce<typename Shape::Tiles, 80>)
    attention_query_gradient(AttentionBackward a) {
    using T = typename Shape::Tiles::Element;
    if constexpr (!kRunsHere<Shape::Tiles::kTuring>) return trap("made for another device");
    const BlockPlace place((a.rows + Shape::kOwn - 1) / Shape::kOwn, 1, a.kv_heads);
    const QueryRows<T> own[2] = {{a.q, place.batch, place.kv_head, a.group_size},
                                 {a.grad_out, place.batch, place.kv_head, a.group_size}};
    const KeyRows<T> others[2] = {{a.k, place.batch, place.kv_head},
                                  {a.v, place.batch, place.kv_head}};
    float grad_q[Shape::kColumns / 8][4] = {}, unused[Shape::kColumns / 8][4];
    walk<Shape, RowsOwned<Shape>>(a, place, a.rows, own, others, grad_q, unused);

    const int first = place.tile * Shape::kOwn + threadIdx.x / 32 * 16;
    MLLAMA_UNROLL for (int h = 0; h < 2; ++h) {
        int row = first + tile_row(2 * h);
        if (row >= a.rows) continue;
        int64_t at = RowPlace(a, place, row).by_query * a.size;
        store_row(static_cast<T*>(a.grad_q) + at, grad_q, h, a.size, a.scale);
    }
}

// ---- deltas

constexpr int kDeltaWarps = 4;

// A warp has a query of a head.
template <class T>
__global__ void __launch_bounds__(32 * kDeltaWarps) attention_deltas(AttentionBackward a) {
    int64_t i = int64_t{blockIdx.x} * kDeltaWarps + threadIdx.x / 32,
            per_batch = int64_t{a.queries} * a.heads;
    if (i >= a.batch * per_batch) return;
    const int64_t batch = i / per_batch, query = i % per_batch / a.heads, head = i % a.heads;
    const T* out = static_cast<const T*>(a.out) + i * a.size;
    const T* gradient = static_cast<const T*>(a.grad_out.data) + batch * a.grad_out.batch +
                        query * a.grad_out.length + head * a.grad_out.head;
    float sum = 0;
    for (int d = threadIdx.x % 32; d < a.size; d += 32)
        sum += to_float(out[d]) * to_float(gradient[d]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) a.deltas[(batch * a.heads + head) * a.queries + query] = sum;
}

}  // namespace mllama::cuda
