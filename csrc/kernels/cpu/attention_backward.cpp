// Gradients. With P = exp(scores - highest) / sum and delta = rowsum(dO * O):
//     dV = P' dO,  dS = P * (dO V' - delta),  dQ = scale * dS K,  dK = scale * dS' Q.
// Scores are computed again, tile by tile. A task owns its group's dK and dV (or one of a fixed
// number of partial sums of them, added in order afterwards), so there are no atomics and the bits
// do not depend on the threads.
#include "kernels/cpu/attention.h"
#include "kernels/cpu/attention_tiles.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

constexpr int kKeys = 64;  // in a block: P and dS together fit the first-level cache

// Stores a tile of P or dS [keys, rows] as the products read it: `by_key` as the broadcast side,
// summed over rows (dV and dK), `by_row` as lanes, summed over keys (dQ). In f32 one copy serves
// both.
template <int NV>
inline __attribute__((always_inline)) void put_scores(F32Words, const Tile<NV>& tile, Word* by_key,
                                                      Word*) {
    for_tile<NV>([&](int r, int n) { store_words(by_key + (r * NV + n) * kWidth, tile[r][n]); });
}
#if defined(__AVX512BF16__)
template <int NV>
inline __attribute__((always_inline)) void put_scores(Bf16Words, const Tile<NV>& tile, Word* by_key,
                                                      Word* by_row) {
    for_tile<NV>([&](int r, int n) {
        auto half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(tile[r][n]));
        std::memcpy(by_key + (r * NV + n) * kWidth / 2, &half, sizeof half);
        if (by_row && r % 2)
            store_words(by_row + (r / 2 * NV + n) * kWidth, join_bf16(tile[r - 1][n], tile[r][n]));
    });
}
#endif

// One thread's work on elements T; E is the word format of the products.
template <class T, class E = typename WordsOf<T>::type>
class Backward {
  public:
    explicit Backward(const AttentionBackward& args) : a_(args) {}

    void task(int64_t index, int64_t part) {
        Group group(a_, index);
        open_sums(group, a_.parts == 1
                             ? own_sums_
                             : a_.partial + (index * a_.parts + part) * attention_sums(a_));
        for (int64_t i = 0; i < 2 * sums_size(group); i += kWidth) store(grad_k_ + i, vf{});
        pack_tiles<E>(group.key_rows<T>(a_.k), group.keys, a_.size, room_, k_tiles_);
        pack_tiles<E>(group.key_rows<T>(a_.v), group.keys, a_.size, room_, v_tiles_);
        pack_rows<E>(group.key_rows<T>(a_.k), group.keys, a_.size, columns_, k_rows_);
        for (int64_t from = 0; from == 0 || from < group.keys; from += chunk_) {
            float* grad_q = grad_q_;
            for_row_tiles(a_, part, a_.parts, [&](int64_t first, int64_t rows, auto vectors) {
                const Limits<vectors> limits(group, first, rows);
                if (from == 0) std::memset(grad_q, 0, columns_ * kLanes * sizeof(float));
                // The last chunk with keys visible to the rows; the first one if there are none.
                bool last = limits.most <= from + chunk_ && (from == 0 || limits.most > from);
                if (last || (limits.most > from && limits.begin() < from + chunk_)) {
                    pack_queries(group, first, rows, vectors * kWidth);
                    tile<vectors>(group, limits, from, grad_q);
                    if (last) write_queries(group, first, rows, vectors * kWidth, grad_q);
                }
                if (chunk_ < a_.keys) grad_q += columns_ * kLanes;
            });
        }
        if (a_.parts == 1) write_keys(group);
    }

    // Adds up the parts of a group, in order, and writes them.
    void sum(int64_t index) {
        Group group(a_, index);
        open_sums(group, a_.partial + index * a_.parts * attention_sums(a_));
        for (int64_t part = 1; part < a_.parts; ++part) {
            const float* one = grad_k_ + part * attention_sums(a_);
            for (int64_t i = 0; i < 2 * sums_size(group); i += kWidth)
                store(grad_k_ + i, load(grad_k_ + i) + load(one + i));
        }
        write_keys(group);
    }

  private:
    int64_t tiles() const {
        return (a_.rows() + kLanes * a_.parts - 1) / (kLanes * a_.parts);
    }  // of a part, at most
    int64_t sums_size(const Group& group) const {
        return round_up(group.keys, kTileRows) * columns_;
    }
    void open_sums(const Group& group, float* sums) {
        grad_k_ = sums, grad_v_ = sums + sums_size(group);
    }

    void pack_queries(const Group& group, int64_t first, int64_t rows, int64_t lanes) {
        auto q_row = group.query_rows<T>(a_.q, first),
             g_row = group.query_rows<T>(a_.grad_out, first);
        pack_columns<E>(q_row, rows, lanes, a_.size, room_, q_lanes_);
        pack_columns<E>(g_row, rows, lanes, a_.size, room_, g_lanes_);
        // Rows past the last have P = 0, which must not be multiplied with stale memory.
        int64_t last = (rows - 1) / E::kElements * columns_,
                size = lanes / E::kElements * columns_ - last;
        std::memset(q_rows_ + last, 0, size * sizeof(Word));
        std::memset(g_rows_ + last, 0, size * sizeof(Word));
        pack_rows<E>(q_row, rows, a_.size, columns_, q_rows_);
        pack_rows<E>(g_row, rows, a_.size, columns_, g_rows_);
        for (int64_t r = 0; r < lanes; ++r) {
            highest_[r] = kInfinity;  // an absent row, or one without visible keys, has P = 0
            inverse_[r] = delta_[r] = 0;
            if (r >= rows) continue;
            if (auto [highest, sum] = a_.statistics[group.statistic(first + r)]; sum != 0) {
                highest_[r] = highest;
                inverse_[r] = 1 / sum;
            }
            const T *g = g_row(r), *out = static_cast<const T*>(a_.out) + group.element(first + r);
            vf sum{};
            for_vectors(a_.size, [&](int64_t d, int n) { sum += at(g + d, n) * at(out + d, n); });
            delta_[r] = reduce_add(sum);
        }
    }

    // For one chunk of keys, adds the rows' share to grad_k_ and grad_v_, and their dQ, transposed,
    // to grad_q.
    template <int NV>
    void tile(const Group& group, const Limits<NV>& limits, int64_t from, float* grad_q) {
        constexpr int kTileLanes = NV * kWidth,
                      kKeyWords = kTileLanes / E::kElements;  // words of a key in p_ and ds_
        const float* added =
            group.visible.added ? group.visible.added + group.visible.first : nullptr;
        vf highest[NV], inverse[NV], delta[NV];
        std::memcpy(highest, highest_, sizeof highest);
        std::memcpy(inverse, inverse_, sizeof inverse);
        std::memcpy(delta, delta_, sizeof delta);

        const int end = static_cast<int>(std::min<int64_t>(from + chunk_, limits.most));
        for (int block = std::max(static_cast<int>(from), limits.begin()); block < end;
             block += kKeys) {
            int keys = std::min(kKeys, end - block);
            for (int key = 0; key < keys; key += kTileRows) {
                const int64_t at = (block + key) * words_;
                Tile<NV> p{}, ds{};
                multiply_add<E, 1>(p, k_tiles_ + at, kTileRows, q_lanes_, kTileLanes, words_);
                cap(scale_, p);
                bool masked = added || !limits.all_see(block + key, kTileRows);
                for_tile<NV>([&](int r, int n) {
                    vf score = p[r][n] * scale_.factor;
                    if (scale_.capped)
                        store(slope_ + (r * NV + n) * kWidth, 1.0f - p[r][n] * p[r][n]);
                    if (masked) {
                        float more =
                            added && block + key + r < group.keys ? added[block + key + r] : 0.0f;
                        score = limits.template mask<true>(score, n, block + key + r, more);
                    }
                    // Another order of summation can put a score above the highest, by much if
                    // scores are huge.
                    p[r][n] = exp2_below(min(vf{}, score - highest[n])) * inverse[n];
                    store(p_tile_ + (r * NV + n) * kWidth, p[r][n]);
                });
                put_scores<NV>(E{}, p, p_ + key * kKeyWords, nullptr);
                multiply_add<E, 1>(ds, v_tiles_ + at, kTileRows, g_lanes_, kTileLanes, words_);
                for_tile<NV>([&](int r, int n) {
                    ds[r][n] = (ds[r][n] - delta[n]) * load(p_tile_ + (r * NV + n) * kWidth);
                });
                if (scale_.capped) times_slope<NV>(ds);
                put_scores<NV>(E{}, ds, ds_ + key * kKeyWords,
                               ds_lanes_ + key / E::kElements * kTileLanes);
            }
            for (int key = 0; key < keys; key += kTileRows) {
                add_to_keys<kKeyWords>(p_ + key * kKeyWords, g_rows_,
                                       grad_v_ + (block + key) * columns_);
                add_to_keys<kKeyWords>(ds_ + key * kKeyWords, q_rows_,
                                       grad_k_ + (block + key) * columns_);
            }
            const Word *k = k_rows_ + block / E::kElements * columns_,
                       *ds = E::kElements == 1 ? ds_ : ds_lanes_;
            int64_t steps = (keys + E::kElements - 1) / E::kElements;
            for (int64_t d = 0; d < round_up(a_.size, kTileRows); d += kTileRows) {
                Tile<NV> tile;
                load_tile<NV>(tile, grad_q + d * kTileLanes, kTileLanes);
                multiply_add<E, 1>(tile, k + d, columns_, ds, kTileLanes, steps);
                store_tile<NV>(tile, grad_q + d * kTileLanes, kTileLanes);
            }
        }
    }

    // From the gradient of capped scores to that of the scores. A hidden key's slope may be NaN.
    template <int NV>
    __attribute__((always_inline)) void times_slope(Tile<NV>& ds) {
        for_tile<NV>([&](int r, int n) {
            vf slope = load(slope_ + (r * NV + n) * kWidth);
            ds[r][n] = load(p_tile_ + (r * NV + n) * kWidth) == 0.0f ? vf{} : ds[r][n] * slope;
        });
    }

    // For a tile of keys: sums[key][d] += scores[key][row] rows[row][d].
    template <int kKeyWords>
    void add_to_keys(const Word* scores, const Word* rows, float* sums) {
        for (int64_t d = 0, width = 0; d < columns_; d += width * kWidth) {
            int64_t left = (columns_ - d) / kWidth;
            width = left == 4 ? 2
                              : std::min<int64_t>(
                                    left, 3);  // 4 as 2 + 2: a narrow tile waits for its own sums
            switch (width) {
                case 1: add_columns<kKeyWords, 1>(scores, rows + d, sums + d); break;
                case 2: add_columns<kKeyWords, 2>(scores, rows + d, sums + d); break;
                default: add_columns<kKeyWords, 3>(scores, rows + d, sums + d);
            }
        }
    }
    template <int kKeyWords, int NV>
    void add_columns(const Word* scores, const Word* rows, float* sums) {
        Tile<NV> tile;
        load_tile<NV>(tile, sums, columns_);
        multiply_add<E, kKeyWords>(tile, scores, 1, rows, columns_, kKeyWords);
        store_tile<NV>(tile, sums, columns_);
    }

    void write_queries(const Group& group, int64_t first, int64_t rows, int64_t lanes,
                       float* grad_q) {
        transpose(as_words(grad_q), lanes, room_, columns_, columns_, lanes);
        for (int64_t r = 0; r < rows; ++r) {
            const float* from = as_floats(room_) + r * columns_;
            T* to = static_cast<T*>(a_.grad_q) + group.element(first + r);
            for_vectors(a_.size,
                        [&](int64_t d, int n) { put(to + d, load(from + d) * a_.scale, n); });
        }
    }

    void write_keys(const Group& group) {
        for (int64_t key = 0; key < a_.keys; ++key) {
            int64_t to = ((group.batch * a_.keys + key) * a_.kv_heads + group.kv_head) * a_.size;
            T *k = static_cast<T*>(a_.grad_k) + to, *v = static_cast<T*>(a_.grad_v) + to;
            int64_t from = (key - group.visible.first) * columns_;
            bool visible = key >= group.visible.first && key < group.visible.first + group.keys;
            for_vectors(a_.size, [&](int64_t d, int n) {
                put(k + d, visible ? load(grad_k_ + from + d) * a_.scale : vf{}, n);
                put(v + d, visible ? load(grad_v_ + from + d) : vf{}, n);
            });
        }
    }

    const AttentionBackward& a_;
    const int64_t words_ =
        row_words<E>(a_.size);  // in a packed row that becomes a column, or part of a tile
    const int64_t columns_ =
        round_up(a_.size, kWidth);  // in a packed row that stays one, and in sums
    const int64_t keys_ = round_up(a_.keys, kTileRows);
    // Keys that all tiles of rows process before the next ones: their data, 20 bytes per element,
    // stays in a cache.
    const int64_t chunk_ = round_up(131072 / columns_, kKeys);
    const ScoreScale scale_{a_};
    Words k_tiles_{keys_ * words_}, v_tiles_{keys_ * words_}, k_rows_{keys_ * columns_};
    Words q_lanes_{kLanes * words_}, g_lanes_{kLanes * words_}, q_rows_{kLanes * columns_},
        g_rows_{kLanes * columns_};
    Words p_{kKeys * kLanes}, ds_{kKeys * kLanes}, ds_lanes_{kKeys * kLanes},
        room_{kLanes * kMaxSize};
    Floats p_tile_{kTileRows * kLanes};  // a tile of P
    Floats slope_{kTileRows * kLanes};   // and of the soft cap's derivative
    Floats grad_q_{(chunk_ < a_.keys ? tiles() : 1) * columns_ *
                   kLanes};  // dQ of the tiles that wait for more keys
    Floats own_sums_{a_.parts == 1 ? attention_sums(a_) : 0};
    float *grad_k_ = nullptr, *grad_v_ = nullptr;  // sums [keys, columns] that are open now
    float highest_[kLanes], inverse_[kLanes], delta_[kLanes];
};

}  // namespace

void attention_backward(const AttentionBackward& args, int64_t first_task, int64_t last_task) {
    dispatch(args.dtype, [&](auto t) {
        Backward<decltype(t)> work(args);
        for (int64_t task = first_task; task < last_task; ++task)
            work.task(task / args.parts, task % args.parts);
    });
}

void attention_backward_sum(const AttentionBackward& args, int64_t first_group,
                            int64_t last_group) {
    dispatch(args.dtype, [&](auto t) {
        Backward<decltype(t)> work(args);
        for (int64_t group = first_group; group < last_group; ++group) work.sum(group);
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
