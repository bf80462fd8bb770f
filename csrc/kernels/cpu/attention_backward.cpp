// Gradients. With P = exp(scores - lse) and delta = rowsum(dO * O):
//     dV = P' dO,  dS = P * (dO V' - delta),  dQ = scale * dS K,  dK = scale * dS' Q.
// Scores are computed again tile by tile. One task owns a pair's dK and dV (or one of a fixed number of partial sums of
// them, added in order afterwards), so there are no atomics and the bits do not depend on the threads.
#include <algorithm>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/attention_tiles.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

constexpr int kLanes = kTileVectors * kWidth;  // queries in a tile
constexpr int kKeys = 64;                      // keys in a block: P and dS together fit the first-level cache

// The tile of P or dS the products need in three readings: keys as rows (dV, dK: the broadcast side, summed over
// queries) and queries as lanes (dQ, summed over keys). In f32 one copy serves both.
template <class E>
struct Scores;

template <>
struct Scores<Singles> {
    template <int NV>
    static __attribute__((always_inline)) void put(const Tile<NV>& tile, Word* rows, Word*) {
        for_tile<NV>([&](int r, int n) { store_words(rows + (r * NV + n) * kWidth, tile[r][n]); });
    }
    static const Word* lanes(const Word* rows, const Word*) { return rows; }
};

#if defined(__AVX512BF16__)
template <>
struct Scores<Pairs> {
    template <int NV>
    static __attribute__((always_inline)) void put(const Tile<NV>& tile, Word* rows, Word* lanes) {
        for_tile<NV>([&](int r, int n) {
            auto half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(tile[r][n]));
            std::memcpy(rows + (r * NV + n) * kWidth / 2, &half, sizeof half);
            if (lanes && r % 2) {
                store_words(lanes + (r / 2 * NV + n) * kWidth, join_pairs(tile[r - 1][n], tile[r][n]));
            }
        });
    }
    static const Word* lanes(const Word*, const Word* lanes) { return lanes; }
};
#endif

template <class E>
class Backward {
  public:
    explicit Backward(const AttentionBackward& args)
        : a_(args),
          words_(row_words<E>(args.size)),
          columns_(round_up(args.size, kWidth)),
          scale_(args.scale * kLog2e),
          k_tiles_(round_up(args.keys, kTileRows) * words_),
          v_tiles_(round_up(args.keys, kTileRows) * words_),
          k_rows_(round_up(args.keys, kTileRows) * columns_),
          own_(args.parts == 1 ? attention_partial_size(args) : 0),
          q_lanes_(kLanes * words_),
          g_lanes_(kLanes * words_),
          q_rows_(kLanes * columns_),
          g_rows_(kLanes * columns_),
          p_(kKeys * kLanes),
          ds_(kKeys * kLanes),
          ds_lanes_(kKeys * kLanes),
          grad_q_(columns_ * kLanes),
          room_(kLanes * kMaxSize),
          added_(round_up(args.keys, kTileRows)) {
        std::memset(added_, 0, round_up(args.keys, kTileRows) * sizeof(float));
    }

    template <class T>
    void task(int64_t pair, int64_t part) {
        batch_ = pair / a_.kv_heads;
        head_ = pair % a_.kv_heads;
        visible_ = a_.visible[batch_];
        keys_ = visible_.limit(a_.queries - 1) - visible_.first;
        grad_k_ = a_.parts == 1 ? own_ : a_.partial + (pair * a_.parts + part) * attention_partial_size(a_);
        grad_v_ = grad_k_ + round_up(keys_, kTileRows) * columns_;
        std::memset(grad_k_, 0, 2 * round_up(keys_, kTileRows) * columns_ * sizeof(float));
        pack_keys<T>();
        for (int64_t row = part * kLanes; row < a_.rows(); row += a_.parts * kLanes) {
            int64_t rows = std::min<int64_t>(kLanes, a_.rows() - row);
            pack_queries<T>(row, rows);
            switch ((rows + kWidth - 1) / kWidth) {
                case 1: tile<1>(row, rows); break;
                case 2: tile<2>(row, rows); break;
                default: tile<3>(row, rows);
            }
            write_queries<T>(row, rows);
        }
        if (a_.parts == 1) write_keys<T>(grad_k_);
    }

    // Adds up the parts of a pair, in order, and writes them.
    template <class T>
    void sum(int64_t pair) {
        batch_ = pair / a_.kv_heads;
        head_ = pair % a_.kv_heads;
        visible_ = a_.visible[batch_];
        keys_ = visible_.limit(a_.queries - 1) - visible_.first;
        float* total = a_.partial + pair * a_.parts * attention_partial_size(a_);
        int64_t size = 2 * round_up(keys_, kTileRows) * columns_;
        for (int64_t part = 1; part < a_.parts; ++part) {
            const float* one = total + part * attention_partial_size(a_);
            for (int64_t i = 0; i < size; i += kWidth) store(total + i, load(total + i) + load(one + i));
        }
        write_keys<T>(total);
    }

  private:
    int64_t query(int64_t row) const { return row / a_.group(); }
    int64_t head(int64_t row) const { return head_ * a_.group() + row % a_.group(); }
    static int64_t lanes(int64_t rows) { return round_up(rows, kWidth); }

    template <class T>
    void pack_keys() {
        auto rows_of = [this](const Heads& t) {
            const T* base =
                static_cast<const T*>(t.data) + batch_ * t.batch + visible_.first * t.length + head_ * t.head;
            return [base, stride = t.length](int64_t i) { return base + i * stride; };
        };
        auto k_row = rows_of(a_.k), v_row = rows_of(a_.v);
        pack_tiles<E>(k_row, keys_, a_.size, room_, k_tiles_);
        pack_tiles<E>(v_row, keys_, a_.size, room_, v_tiles_);
        pack_rows<E>(k_row, keys_, a_.size, columns_, k_rows_);
        if (visible_.added) std::memcpy(added_, visible_.added + visible_.first, keys_ * sizeof(float));
    }

    template <class T>
    void pack_queries(int64_t first, int64_t rows) {
        auto rows_of = [&](const Heads& t) {
            const T* base = static_cast<const T*>(t.data) + batch_ * t.batch;
            return [this, base, &t, first](int64_t r) {
                return base + query(first + r) * t.length + head(first + r) * t.head;
            };
        };
        auto q_row = rows_of(a_.q), g_row = rows_of(a_.grad_out);
        pack_columns<E>(q_row, rows, lanes(rows), a_.size, room_, q_lanes_);
        pack_columns<E>(g_row, rows, lanes(rows), a_.size, room_, g_lanes_);
        // Rows that are not there meet P = 0, which must not meet what an earlier tile left.
        std::memset(q_rows_, 0, lanes(rows) / E::kElements * columns_ * sizeof(Word));
        std::memset(g_rows_, 0, lanes(rows) / E::kElements * columns_ * sizeof(Word));
        pack_rows<E>(q_row, rows, a_.size, columns_, q_rows_);
        pack_rows<E>(g_row, rows, a_.size, columns_, g_rows_);
        for (int64_t r = 0; r < kLanes; ++r) {
            lse_[r] = kInfinity;  // a query that is not there, or sees nothing, has P = 0
            delta_[r] = 0;
            if (r >= rows) continue;
            float lse = a_.lse[(batch_ * a_.heads + head(first + r)) * a_.queries + query(first + r)];
            if (lse != -kInfinity) lse_[r] = lse * kLog2e;
            const T* g = g_row(r);
            const T* out = static_cast<const T*>(a_.out) +
                           ((batch_ * a_.queries + query(first + r)) * a_.heads + head(first + r)) * a_.size;
            vf sum{};
            for_vectors(a_.size, [&](int64_t d, int n) { sum += at(g + d, n) * at(out + d, n); });
            delta_[r] = reduce_add(sum);
        }
    }

    template <int NV>
    void tile(int64_t first, int64_t rows) {
        constexpr int kTileLanes = NV * kWidth, kRow = kTileLanes / E::kElements;  // words in a row of P
        int32_t limits[kTileLanes];
        for (int r = 0; r < kTileLanes; ++r) {
            limits[r] =
                static_cast<int32_t>(visible_.limit(query(first + std::min<int64_t>(r, rows - 1))) - visible_.first);
        }
        vi limit[NV];
        vf lse[NV], delta[NV];
        std::memcpy(limit, limits, sizeof limit);
        std::memcpy(lse, lse_, sizeof lse);
        std::memcpy(delta, delta_, sizeof delta);
        int fewest = limits[0], most = limits[kTileLanes - 1];

        for (int64_t i = 0; i < columns_ * kTileLanes; i += kWidth) store(grad_q_ + i, vf{});
        for (int block = 0; block < most; block += kKeys) {
            int keys = std::min(kKeys, most - block);
            for (int key = 0; key < keys; key += kTileRows) {
                Tile<NV> p{};
                multiply_add<E, 1>(p, k_tiles_ + (block + key) * words_, kTileRows, q_lanes_, kTileLanes, words_);
                const float* added = added_ + block + key;
                bool hidden = block + key + kTileRows > fewest;
                for_tile<NV>([&](int r, int n) {
                    vf score = p[r][n] * scale_ + (added[r] - lse[n]);
                    if (hidden) score = vi{} + (block + key + r) < limit[n] ? score : splat(-kInfinity);
                    p[r][n] = exp2_below(score);
                    store(kept_ + (r * NV + n) * kWidth, p[r][n]);
                });
                Scores<E>::template put<NV>(p, p_ + key * kRow, nullptr);

                Tile<NV> ds{};
                multiply_add<E, 1>(ds, v_tiles_ + (block + key) * words_, kTileRows, g_lanes_, kTileLanes, words_);
                for_tile<NV>(
                    [&](int r, int n) { ds[r][n] = (ds[r][n] - delta[n]) * load(kept_ + (r * NV + n) * kWidth); });
                Scores<E>::template put<NV>(ds, ds_ + key * kRow, ds_lanes_ + key / E::kElements * kTileLanes);
            }
            for (int key = 0; key < keys; key += kTileRows) {
                add_to_keys<kRow>(p_ + key * kRow, g_rows_, grad_v_ + (block + key) * columns_);
                add_to_keys<kRow>(ds_ + key * kRow, q_rows_, grad_k_ + (block + key) * columns_);
            }
            const Word* ds = Scores<E>::lanes(ds_, ds_lanes_);
            int64_t steps = (keys + E::kElements - 1) / E::kElements;
            for (int64_t d = 0; d < round_up(a_.size, kTileRows); d += kTileRows) {
                Tile<NV> acc;
                load_tile(acc, grad_q_ + d * kTileLanes, kTileLanes);
                multiply_add<E, 1>(acc, k_rows_ + block / E::kElements * columns_ + d, columns_, ds, kTileLanes, steps);
                store_tile(acc, grad_q_ + d * kTileLanes, kTileLanes);
            }
        }
    }

    // A tile of keys: sums[key][columns] += scores[key][query] rows[query][columns].
    template <int kRow>
    void add_to_keys(const Word* scores, const Word* rows, float* sums) {
        int64_t d = 0, step = 0;
        for (; d < columns_; d += step * kWidth) {
            int64_t left = (columns_ - d) / kWidth;
            step =
                left == 4 ? 2 : std::min<int64_t>(left, 3);  // 4 as 2 + 2: 3 + 1 would leave the 1 waiting for its sums
            switch (step) {
                case 1: add_columns<kRow, 1>(scores, rows + d, sums + d); break;
                case 2: add_columns<kRow, 2>(scores, rows + d, sums + d); break;
                default: add_columns<kRow, 3>(scores, rows + d, sums + d);
            }
        }
    }
    template <int kRow, int NV>
    void add_columns(const Word* scores, const Word* rows, float* sums) {
        Tile<NV> acc;
        load_tile(acc, sums, columns_);
        multiply_add<E, kRow>(acc, scores, 1, rows, columns_, kRow);
        store_tile(acc, sums, columns_);
    }

    template <class T>
    void write_queries(int64_t first, int64_t rows) {
        int64_t width = lanes(rows);
        transpose(reinterpret_cast<const Word*>(static_cast<float*>(grad_q_)), width, room_, columns_, columns_, width);
        const float* sums = reinterpret_cast<const float*>(static_cast<Word*>(room_));
        for (int64_t r = 0; r < rows; ++r) {
            T* to = static_cast<T*>(a_.grad_q) +
                    ((batch_ * a_.queries + query(first + r)) * a_.heads + head(first + r)) * a_.size;
            for_vectors(a_.size, [&](int64_t d, int n) { put(to + d, load(sums + r * columns_ + d) * a_.scale, n); });
        }
    }

    template <class T>
    void write_keys(const float* grad_k) {
        const float* grad_v = grad_k + round_up(keys_, kTileRows) * columns_;
        for (int64_t key = 0; key < a_.keys; ++key) {
            int64_t i = key - visible_.first, at = ((batch_ * a_.keys + key) * a_.kv_heads + head_) * a_.size;
            T *k = static_cast<T*>(a_.grad_k) + at, *v = static_cast<T*>(a_.grad_v) + at;
            if (i < 0 || i >= keys_) {
                std::memset(k, 0, a_.size * sizeof(T));
                std::memset(v, 0, a_.size * sizeof(T));
                continue;
            }
            for_vectors(a_.size, [&](int64_t d, int n) {
                put(k + d, load(grad_k + i * columns_ + d) * a_.scale, n);
                put(v + d, load(grad_v + i * columns_ + d), n);
            });
        }
    }

    const AttentionBackward& a_;
    const int64_t words_, columns_;
    const float scale_;
    Scratch<Word> k_tiles_, v_tiles_, k_rows_;
    Scratch<float> own_;
    Scratch<Word> q_lanes_, g_lanes_, q_rows_, g_rows_;
    Scratch<Word> p_, ds_, ds_lanes_;
    Scratch<float> grad_q_;
    Scratch<Word> room_;
    Scratch<float> added_;
    alignas(64) float kept_[kTileRows * kLanes];  // a tile of P in f32
    alignas(64) float lse_[kLanes], delta_[kLanes];
    int64_t batch_, head_, keys_;
    float *grad_k_, *grad_v_;  // f32 sums [keys, columns]
    VisibleKeys visible_;
};

}  // namespace

void attention_backward(const AttentionBackward& args, int64_t first_task, int64_t last_task) {
    dispatch(args.dtype, [&](auto t) {
        using T = decltype(t);
        Backward<typename WordsOf<T>::type> work(args);
        for (int64_t task = first_task; task < last_task; ++task)
            work.template task<T>(task / args.parts, task % args.parts);
    });
}

void attention_backward_sum(const AttentionBackward& args, int64_t first_pair, int64_t last_pair) {
    dispatch(args.dtype, [&](auto t) {
        using T = decltype(t);
        Backward<typename WordsOf<T>::type> work(args);
        for (int64_t pair = first_pair; pair < last_pair; ++pair) work.template sum<T>(pair);
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
