// The forward pass for many queries (prefill, towers): an online softmax over blocks of keys.
#include <algorithm>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/attention_tiles.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

constexpr int kLanes = kTileVectors * kWidth;  // queries in a tile
constexpr int kKeys = 128;                     // keys in a block: kKeys x kLanes f32 scores fit the first-level cache

// One thread's work. E is the word format of the products.
template <class E>
class Prefill {
  public:
    Prefill(const AttentionForward& args)
        : a_(args),
          words_(row_words<E>(args.size)),
          columns_(round_up(args.size, kWidth)),
          keys_(round_up(args.keys, kTileRows)),
          scale_(args.scale * kLog2e),
          k_(keys_ * words_),
          v_(keys_ * columns_),
          q_(kLanes * words_),
          scores_(kKeys * kLanes),
          out_(columns_ * kLanes),
          room_(kLanes * kMaxSize),
          added_(keys_) {
        std::memset(added_, 0, keys_ * sizeof(float));
    }

    template <class T>
    void task(int64_t pair, int64_t share, int64_t shares) {
        batch_ = pair / a_.kv_heads;
        head_ = pair % a_.kv_heads;
        visible_ = a_.visible[batch_];
        int64_t keys = visible_.limit(a_.queries - 1) - visible_.first;  // what the last query sees, all see at most
        pack_keys<T>(keys);
        for (int64_t row = share * kLanes; row < a_.rows(); row += shares * kLanes) {
            int64_t rows = std::min<int64_t>(kLanes, a_.rows() - row);
            pack_queries<T>(row, rows);
            switch ((rows + kWidth - 1) / kWidth) {
                case 1: tile<1>(row, rows); break;
                case 2: tile<2>(row, rows); break;
                default: tile<3>(row, rows);
            }
            write<T>(row, rows);
        }
    }

  private:
    int64_t query(int64_t row) const { return row / a_.group(); }
    int64_t head(int64_t row) const { return head_ * a_.group() + row % a_.group(); }
    static int64_t lanes(int64_t rows) { return round_up(rows, kWidth); }

    // K in panels [tile of keys][word][kTileRows], V as rows [key][columns] (or pairs of keys).
    template <class T>
    void pack_keys(int64_t keys) {
        auto row_of = [this](const Heads& t) {
            const T* base =
                static_cast<const T*>(t.data) + batch_ * t.batch + visible_.first * t.length + head_ * t.head;
            return [base, stride = t.length](int64_t i) { return base + i * stride; };
        };
        pack_tiles<E>(row_of(a_.k), keys, a_.size, room_, k_);
        pack_rows<E>(row_of(a_.v), keys, a_.size, columns_, v_);
        if (visible_.added) std::memcpy(added_, visible_.added + visible_.first, keys * sizeof(float));
    }

    template <class T>
    void pack_queries(int64_t first, int64_t rows) {
        const T* base = static_cast<const T*>(a_.q.data) + batch_ * a_.q.batch;
        auto row_at = [&](int64_t r) { return base + query(first + r) * a_.q.length + head(first + r) * a_.q.head; };
        pack_columns<E>(row_at, rows, lanes(rows), a_.size, room_, q_);
    }

    // Leaves the tile's weighted sums of V, transposed, in out_ and its statistics in max_ and sum_.
    template <int NV>
    void tile(int64_t first, int64_t rows) {
        constexpr int kTileLanes = NV * kWidth;
        int32_t limits[kTileLanes];  // counted from visible_.first; rows past the last repeat it
        for (int r = 0; r < kTileLanes; ++r) {
            limits[r] =
                static_cast<int32_t>(visible_.limit(query(first + std::min<int64_t>(r, rows - 1))) - visible_.first);
        }
        vi limit[NV];
        std::memcpy(limit, limits, sizeof limit);
        int fewest = limits[0], most = limits[kTileLanes - 1];

        vf max_score[NV], sum[NV];
        for (int n = 0; n < NV; ++n) max_score[n] = splat(-kInfinity), sum[n] = vf{};
        for (int64_t i = 0; i < columns_ * kTileLanes; i += kWidth) store(out_ + i, vf{});
        for (int block = 0; block < most; block += kKeys) {
            int keys = std::min(kKeys, most - block);
            vf highest[NV];
            for (int n = 0; n < NV; ++n) highest[n] = max_score[n];
            for (int key = 0; key < keys; key += kTileRows) {
                Tile<NV> acc{};
                multiply_add<E, 1>(acc, k_ + (block + key) * words_, kTileRows, q_, kTileLanes, words_);
                float* scores = scores_ + key * kTileLanes;
                if (!visible_.added && block + key + kTileRows <= fewest) {
                    finish_scores<NV>(acc, scores, highest);
                } else {
                    finish_masked<NV>(acc, scores, highest, block + key, limit, added_ + block + key);
                }
            }
            vf shift[NV], shrink[NV];
            for (int n = 0; n < NV; ++n) {
                shift[n] = highest[n] == -kInfinity ? vf{} : highest[n];  // a lane that has seen nothing yet
                shrink[n] = exp2_below(max_score[n] - shift[n]);
                max_score[n] = highest[n];
                sum[n] *= shrink[n];
            }
            exponentials<NV>(keys, shift, sum);
            int64_t steps = (keys + E::kElements - 1) / E::kElements;
            for (int64_t d = 0; d < round_up(a_.size, kTileRows); d += kTileRows) {
                Tile<NV> acc;
                load_tile(acc, out_ + d * kTileLanes, kTileLanes);
                for_tile<NV>([&](int r, int n) { acc[r][n] *= shrink[n]; });
                multiply_add<E, 1>(acc, v_ + block / E::kElements * columns_ + d, columns_,
                                   reinterpret_cast<const Word*>(static_cast<float*>(scores_)), kTileLanes, steps);
                store_tile(acc, out_ + d * kTileLanes, kTileLanes);
            }
        }
        for (int n = 0; n < NV; ++n) {
            store(max_ + n * kWidth, max_score[n]);
            store(sum_ + n * kWidth, sum[n]);
        }
    }

    // Scales a tile of scores, stores them and keeps the lanes' running maximum.
    template <int NV>
    __attribute__((always_inline)) void finish_scores(const Tile<NV>& tile, float* scores, vf (&highest)[NV]) {
        for_tile<NV>([&](int r, int n) {
            vf score = tile[r][n] * scale_;
            highest[n] = max(highest[n], score);
            store(scores + (r * NV + n) * kWidth, score);
        });
    }

    // The same where something is added to keys, or some of the lanes do not see all of them.
    template <int NV>
    __attribute__((always_inline)) void finish_masked(const Tile<NV>& tile, float* scores, vf (&highest)[NV], int key,
                                                      const vi (&limit)[NV], const float* added) {
        for_tile<NV>([&](int r, int n) {
            vf score = tile[r][n] * scale_ + added[r];
            score = vi{} + (key + r) < limit[n] ? score : splat(-kInfinity);
            highest[n] = max(highest[n], score);
            store(scores + (r * NV + n) * kWidth, score);
        });
    }

    // Scores become 2^(score - shift), in the words the product with V takes, over the scores.
    template <int NV>
    void exponentials(int keys, const vf (&shift)[NV], vf (&sum)[NV]) {
        float* scores = scores_;
        for (int key = 0; key < keys; key += E::kElements) {
            for (int n = 0; n < NV; ++n) {
                float* at = scores + (key * NV + n) * kWidth;
                vf p = exp2_below(load(at) - shift[n]);
                sum[n] += p;
                if constexpr (E::kElements == 1) {
                    store(at, p);
                } else {
                    vf next{};
                    if (key + 1 < keys) next = exp2_below(load(at + NV * kWidth) - shift[n]);
                    sum[n] += next;
                    store(scores + (key / 2 * NV + n) * kWidth, join_pairs(p, next));
                }
            }
        }
    }

    template <class T>
    void write(int64_t first, int64_t rows) {
        int64_t width = lanes(rows);
        float inverse[kLanes];
        for (int64_t r = 0; r < rows; ++r) {
            inverse[r] = sum_[r] == 0 ? 0 : 1 / sum_[r];
            a_.lse[(batch_ * a_.heads + head(first + r)) * a_.queries + query(first + r)] =
                sum_[r] == 0 ? -kInfinity : (max_[r] + __builtin_log2f(sum_[r])) * kLn2;
        }
        transpose(reinterpret_cast<const Word*>(static_cast<float*>(out_)), width, room_, columns_, columns_, width);
        const float* sums = reinterpret_cast<const float*>(static_cast<Word*>(room_));
        for (int64_t r = 0; r < rows; ++r) {
            T* out = static_cast<T*>(a_.out) +
                     ((batch_ * a_.queries + query(first + r)) * a_.heads + head(first + r)) * a_.size;
            for_vectors(a_.size,
                        [&](int64_t d, int n) { put(out + d, load(sums + r * columns_ + d) * inverse[r], n); });
        }
    }

    const AttentionForward& a_;
    const int64_t words_, columns_, keys_;  // words in a packed row of q or k; f32 in a row of v; keys with padding
    const float scale_;
    Scratch<Word> k_, v_, q_;
    Scratch<float> scores_, out_;
    Scratch<Word> room_;
    Scratch<float> added_;  // to the scores of the packed keys
    float max_[kLanes], sum_[kLanes];
    int64_t batch_, head_;
    VisibleKeys visible_;
};

}  // namespace

void attention_prefill(const AttentionForward& args, int64_t shares, int64_t first_task, int64_t last_task) {
    dispatch(args.dtype, [&](auto t) {
        using T = decltype(t);
        Prefill<typename WordsOf<T>::type> work(args);
        for (int64_t task = first_task; task < last_task; ++task)
            work.template task<T>(task / shares, task % shares, shares);
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
