// The forward pass: an online softmax over tiles of keys. A block has a tile of a group's rows and
// a part of the keys; parts are merged afterwards by their log-sum-exp.
#pragma once

#include "kernels/cuda/attention_tiles.cuh"

namespace mllama::cuda {

using kernels::Statistic;

// A block's warps have 16 rows each, of kRowWarps, and kWarpKeys keys of a tile, of kKeyWarps: many
// rows are shared out among warps, few rows have all warps on different keys.
template <class Tiles_, int kRowWarps_, int kKeyWarps_, int kWarpKeys_>
struct ForwardShape {
    using Tiles = Tiles_;
    static constexpr int kRowWarps = kRowWarps_, kKeyWarps = kKeyWarps_, kWarpKeys = kWarpKeys_;
    static constexpr int kWarps = kRowWarps * kKeyWarps, kThreads = 32 * kWarps;
    static constexpr int kRows = 16 * kRowWarps, kKeys = kKeyWarps * kWarpKeys;
    static constexpr int kBytes =
        (kRows + 2 * kKeys) * Tiles::kStride * static_cast<int>(sizeof(typename Tiles::Element));
    static constexpr bool kFits =
        kBytes <= kTileBytes<Tiles::kTuring> && kWarpKeys <= Tiles::kMostColumns;
};

// One warp's 16 rows: their highest scores, sums of exponentials and weighted sums of v. A lane has
// two rows, and the sums over its own columns of scores.
template <int kColumns>
struct Softmax {
    float sums[kColumns / 8][4] = {};
    float highest[2] = {-kInfinity, -kInfinity}, total[2] = {};

    // Goes on to more keys: scores become exponentials.
    template <int N>
    MLLAMA_DEVICE void add(float (&scores)[N][4]) {
        MLLAMA_UNROLL for (int h = 0; h < 2; ++h) {
            float most = highest[h];
            MLLAMA_UNROLL for (int n = 0; n < N; ++n) {
                most = fmaxf(most, fmaxf(scores[n][2 * h], scores[n][2 * h + 1]));
            }
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
            rescale(h, most);
            float shift = most == -kInfinity ? 0 : most;
            MLLAMA_UNROLL for (int n = 0; n < N; ++n) {
                MLLAMA_UNROLL for (int j = 2 * h; j < 2 * h + 2; ++j) {
                    scores[n][j] = fast_exp2(scores[n][j] - shift);
                    total[h] += scores[n][j];
                }
            }
        }
    }
    // Refers all sums of a row to another highest score, at least its own.
    MLLAMA_DEVICE void rescale(int h, float most) {
        float factor = fast_exp2(highest[h] - (most == -kInfinity ? 0 : most));
        highest[h] = most;
        total[h] *= factor;
        MLLAMA_UNROLL for (int n = 0; n < kColumns / 8; ++n) {
            sums[n][2 * h] *= factor;
            sums[n][2 * h + 1] *= factor;
        }
    }
    // The totals over all columns of scores, in every lane of a row.
    MLLAMA_DEVICE void add_lanes() {
        MLLAMA_UNROLL for (int h = 0; h < 2; ++h) {
            total[h] += __shfl_xor_sync(kAllLanes, total[h], 1);
            total[h] += __shfl_xor_sync(kAllLanes, total[h], 2);
        }
    }
    // Adds up what kWarps warps found for the same rows, in a fixed order, for warp 0. `room` is
    // [16, kColumns], and free once all threads are here.
    template <int kWarps>
    MLLAMA_DEVICE void merge(float* room) {
        using Parts = Array<Statistic, 16 * kWarps>;
        MLLAMA_SHARED(Parts, parts);
        int warp = threadIdx.x / 32;
        MLLAMA_UNROLL for (int h = 0; h < 2; ++h) {
            if (threadIdx.x % 4 == 0) {
                parts[warp * 16 + tile_row(2 * h)] = {highest[h], total[h]};
            }
        }
        __syncthreads();
        MLLAMA_UNROLL for (int h = 0; h < 2; ++h) {
            float most = -kInfinity, sum = 0;
            MLLAMA_UNROLL for (int w = 0; w < kWarps; ++w) {
                most = fmaxf(most, parts[w * 16 + tile_row(2 * h)].highest);
            }
            float shift = most == -kInfinity ? 0 : most;
            MLLAMA_UNROLL for (int w = 0; w < kWarps; ++w) {
                const Statistic& part = parts[w * 16 + tile_row(2 * h)];
                sum += part.sum * fast_exp2(part.highest - shift);
            }
            rescale(h, most);
            total[h] = sum;
        }
        for (int w = kWarps - 1; w >= 0; --w) {
            if (warp == w) {
                MLLAMA_UNROLL for (int n = 0; n < kColumns / 8; ++n) {
                    MLLAMA_UNROLL for (int j = 0; j < 4; ++j) {
                        float& at = room[tile_row(j) * kColumns + tile_column(n, j)];
                        if (w < kWarps - 1) sums[n][j] += at;
                        if (w > 0) at = sums[n][j];
                    }
                }
            }
            __syncthreads();
        }
    }
};

// Which of a tile's keys the lane's two rows see.
struct RowsSee {
    int first[2], last[2];

    // Products become scores; `added` is null if nothing is added to any.
    template <int N>
    MLLAMA_DEVICE void mask(float (&scores)[N][4], const ScoreScale& scale, int first_key,
                            const float* added) const {
        bool sees_all = first_key >= larger(first[0], first[1]) &&
                        first_key + 8 * N <= smaller(last[0], last[1]);
        bool plain = !added && __all_sync(kAllLanes, sees_all);
        MLLAMA_UNROLL for (int n = 0; n < N; ++n) {
            MLLAMA_UNROLL for (int j = 0; j < 4; ++j) {
                int column = tile_column(n, j), key = first_key + column;
                float score = scale.factor * scale.cap(scores[n][j]);
                if (!plain) {
                    float more = added ? added[column] : 0;
                    bool visible = key >= first[j / 2] && key < last[j / 2] && more != -kInfinity;
                    // Selected, not added: a hidden key's score may be NaN.
                    score = visible ? score + more : -kInfinity;
                }
                scores[n][j] = score;
            }
        }
    }
};

// A part's sums, highest score and sum of exponentials of a row.
MLLAMA_DEVICE float* part_of_row(const AttentionForward& a, const BlockPlace& place, int row) {
    int64_t group = place.batch * a.kv_heads + place.kv_head;
    return a.partial + ((group * a.rows + row) * a.parts + place.part) * (a.size + 2);
}

// Writes a warp's rows: of the result, or of a part's.
template <class T, int kColumns>
MLLAMA_DEVICE void write_rows(const AttentionForward& a, const BlockPlace& place, int first_row,
                              const Softmax<kColumns>& softmax) {
    MLLAMA_UNROLL for (int h = 0; h < 2; ++h) {
        int row = first_row + tile_row(2 * h);
        if (row >= a.rows) continue;
        const Statistic statistic{softmax.highest[h], softmax.total[h]};
        if (a.partial) {
            float* to = part_of_row(a, place, row);
            store_row(to, softmax.sums, h, a.size, 1);
            if (threadIdx.x % 4 == 0) {
                to[a.size] = statistic.highest;
                to[a.size + 1] = statistic.sum;
            }
        } else {
            RowPlace at(a, place, row);
            store_row(static_cast<T*>(a.out) + at.by_query * a.size, softmax.sums, h, a.size,
                      statistic.sum == 0 ? 0 : 1 / statistic.sum);
            if (threadIdx.x % 4 == 0) a.statistics[at.by_head] = statistic;
        }
    }
}

// The block's part of the keys that its rows see: whole tiles, but for the last one of all. Tiles
// of parts with part_keys begin at the same keys whatever is visible.
template <class Shape>
MLLAMA_DEVICE KeyRange block_keys(const AttentionForward& a, const BlockPlace& place, int first_row,
                                  RowsSee& see) {
    KeyRange mine{a.keys, 0};
    MLLAMA_UNROLL for (int h = 0; h < 2; ++h) {
        int row = first_row + tile_row(2 * h);
        see.first[h] = 0, see.last[h] = INT_MAX;  // no row: what is computed there is not used
        if (row >= a.rows) continue;
        KeyRange range = visible_keys(a, place.batch, row / a.group_size);
        see.first[h] = range.first, see.last[h] = range.last;
        mine = {smaller(mine.first, range.first), larger(mine.last, range.last)};
    }
    KeyRange keys = keys_of_block<Shape::kWarps>(a, place.batch, mine);
    if (a.part_keys) {
        keys.first = larger(keys.first / Shape::kKeys * Shape::kKeys, place.part * a.part_keys);
        keys.last = smaller(keys.last, (place.part + 1) * a.part_keys);
    } else if (a.parts > 1) {
        int tiles = (keys.last - keys.first + Shape::kKeys - 1) / Shape::kKeys,
            share = (larger(tiles, 0) + a.parts - 1) / a.parts * Shape::kKeys;
        keys.first = smaller(keys.first + place.part * share, keys.last);
        keys.last = smaller(keys.first + share, keys.last);
    }
    return keys;
}

// While a tile of k is used, that of v arrives, and the other way around.
template <class Shape, class Keys>
__global__ void __launch_bounds__(Shape::kThreads, kBlocksAtOnce<typename Shape::Tiles, 128>)
    attention(AttentionForward a) {
    using Tiles = typename Shape::Tiles;
    using T = typename Tiles::Element;
    if constexpr (!kRunsHere<Tiles::kTuring>) return trap("made for another device");
    constexpr int kKeys = Shape::kKeys, kWarpKeys = Shape::kWarpKeys, kStride = Tiles::kStride;
    T *q_tile = dynamic_shared<T>(), *k_tile = q_tile + Shape::kRows * kStride,
      *v_tile = k_tile + kKeys * kStride;
    using Added = Array<float, kKeys>;
    MLLAMA_SHARED(Added, added);

    const BlockPlace place((a.rows + Shape::kRows - 1) / Shape::kRows, a.parts, a.kv_heads);
    const int warp = threadIdx.x / 32, row_warp = warp / Shape::kKeyWarps,
              first_key = warp % Shape::kKeyWarps * kWarpKeys,
              tile_first = place.tile * Shape::kRows, first_row = tile_first + row_warp * 16;
    const bool has_rows = first_row < a.rows, adds = adds_to_scores(a);
    RowsSee see;
    const KeyRange keys = block_keys<Shape>(a, place, first_row, see);
    if (a.part_keys && keys.first >= keys.last) {  // what is merged needs no sums of it
        int row = tile_first + static_cast<int>(threadIdx.x);
        if (threadIdx.x < Shape::kRows && row < a.rows) {
            float* to = part_of_row(a, place, row) + a.size;
            to[0] = -kInfinity, to[1] = 0;
        }
        return;
    }
    const QueryRows<T> q(a.q, place.batch, place.kv_head, a.group_size);
    const Keys k(a.k, place.batch, place.kv_head, a.size),
        v(a.v, place.batch, place.kv_head, a.size);
    auto fetch_keys = [&](T* tile, const Keys& rows, int first) {
        if (first < keys.last) {
            fetch<Tiles, kKeys, Shape::kThreads>(tile, rows, first, keys.last, a.size, a.aligned);
        }
        commit_copies();
    };

    const ScoreScale scale(a);
    Softmax<Tiles::kSize> softmax;
    if (keys.first < keys.last) {
        fetch<Tiles, Shape::kRows, Shape::kThreads>(q_tile, q, tile_first, a.rows, a.size,
                                                    a.aligned);
    }
    fetch_keys(k_tile, k, keys.first);
    fetch_keys(v_tile, v, keys.first);
    for (int key = keys.first; key < keys.last; key += kKeys) {
        if (adds) {
            for (int i = threadIdx.x; i < kKeys; i += Shape::kThreads) {
                added[i] = key + i < keys.last ? added_score(a, place.batch, key + i) : -kInfinity;
            }
        }
        wait_for_copies<1>();
        __syncthreads();
        float scores[kWarpKeys / 8][4] = {};
        if (has_rows) {
            Tiles::multiply_rows(scores, q_tile + row_warp * 16 * kStride,
                                 k_tile + first_key * kStride);
        }
        __syncthreads();
        fetch_keys(k_tile, k, key + kKeys);
        if (has_rows) {
            see.mask(scores, scale, key + first_key, adds ? &added[first_key] : nullptr);
            softmax.add(scores);
        }
        wait_for_copies<1>();
        __syncthreads();
        if (has_rows) {
            Tiles::template multiply_columns<Tiles::kSize>(softmax.sums, scores,
                                                           v_tile + first_key * kStride);
        }
        __syncthreads();
        fetch_keys(v_tile, v, key + kKeys);
    }
    wait_for_copies<0>();
    softmax.add_lanes();
    if constexpr (Shape::kKeyWarps > 1) {
        static_assert(16 * Tiles::kSize * sizeof(float) <= Shape::kBytes);
        softmax.template merge<Shape::kKeyWarps>(reinterpret_cast<float*>(q_tile));
        if (warp > 0) return;
    }
    write_rows<T>(a, place, first_row, softmax);
}

// ---- merging

constexpr int kMergeWarps = 4;

// A warp has a row. Parts without keys are left out.
template <class Out>
__global__ void __launch_bounds__(32 * kMergeWarps) merge_attention(AttentionForward a) {
    int64_t row = int64_t{blockIdx.x} * kMergeWarps + threadIdx.x / 32;
    if (row >= a.batch * a.kv_heads * a.rows) return;
    const int64_t group = row / a.rows, batch = group / a.kv_heads;
    const int in_group = static_cast<int>(row % a.rows), query = in_group / a.group_size,
              head = static_cast<int>(group % a.kv_heads) * a.group_size + in_group % a.group_size;
    const int lane = threadIdx.x % 32, width = a.size + 2;
    int first = 0, last = a.parts;
    if (a.part_keys) {
        KeyRange keys = visible_keys(a, batch, query);
        first = keys.first / a.part_keys;
        last = smaller((keys.last + a.part_keys - 1) / a.part_keys, last);
    }
    const float* parts = a.partial + row * a.parts * width;
    float most = -kInfinity, total = 0;
    for (int p = first; p < last; ++p) most = fmaxf(most, parts[p * width + a.size]);
    const float shift = most == -kInfinity ? 0 : most;
    for (int p = first; p < last; ++p) {
        total += parts[p * width + a.size + 1] * fast_exp2(parts[p * width + a.size] - shift);
    }
    Out* out = static_cast<Out*>(a.out) + ((batch * a.queries + query) * a.heads + head) * a.size;
    const float factor = total == 0 ? 0 : 1 / total;
    for (int d = lane; d < a.size; d += 32) {
        float sum = 0;
        for (int p = first; p < last; ++p) {
            if (parts[p * width + a.size + 1] == 0) continue;
            sum += parts[p * width + d] * fast_exp2(parts[p * width + a.size] - shift);
        }
        out[d] = from_float<Out>(sum * factor);
    }
    if (a.statistics && lane == 0)
        a.statistics[(batch * a.heads + head) * a.queries + query] = {most, total};
}

}  // namespace mllama::cuda
