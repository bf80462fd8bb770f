// The forward pass for many queries (prefill, image encoders): an online softmax over blocks of
// keys.
#include "kernels/cpu/attention.h"

#include "kernels/cpu/attention_tiles.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

constexpr int kKeys = 128;  // in a block: kKeys x kLanes f32 scores fit the first-level cache

// One thread's work on elements T; E is the word format of the products.
template <class T, class E = typename WordsOf<T>::type>
class Prefill {
  public:
    explicit Prefill(const AttentionForward& args) : a_(args) {}

    void task(int64_t index, int64_t share, int64_t shares) {
        Group group(a_, index);
        pack_tiles<E>(group.key_rows<T>(a_.k), group.keys, a_.size, room_, k_);
        pack_rows<E>(group.key_rows<T>(a_.v), group.keys, a_.size, columns_, v_);
        for_row_tiles(a_, share, shares, [&](int64_t first, int64_t rows, auto vectors) {
            pack_columns<E>(group.query_rows<T>(a_.q, first), rows, vectors * kWidth, a_.size,
                            room_, q_);
            tile<vectors>(group, first, rows);
            write(group, first, rows, vectors * kWidth);
        });
    }

  private:
    // Leaves the rows' weighted sums of V, transposed, in out_ and their statistics in max_ and
    // sum_.
    template <int NV>
    void tile(const Group& group, int64_t first, int64_t rows) {
        constexpr int kTileLanes = NV * kWidth;
        const Limits<NV> limits(group, first, rows);
        const float* added =
            group.visible.added ? group.visible.added + group.visible.first : nullptr;
        vf highest[NV], sum[NV];
        for (int n = 0; n < NV; ++n) highest[n] = splat(-kInfinity), sum[n] = vf{};
        for (int64_t i = 0; i < columns_ * kTileLanes; i += kWidth) store(out_ + i, vf{});

        for (int block = limits.begin(); block < limits.most; block += kKeys) {
            int keys = std::min(kKeys, limits.most - block);
            vf before[NV];
            for (int n = 0; n < NV; ++n) before[n] = highest[n];
            for (int key = 0; key < keys; key += kTileRows) {
                Tile<NV> tile{};
                multiply_add<E, 1>(tile, k_ + (block + key) * words_, kTileRows, q_, kTileLanes,
                                   words_);
                cap(scale_, tile);
                float* scores = scores_ + key * kTileLanes;
                if (!added && limits.all_see(block + key, kTileRows)) {
                    finish<NV>(tile, scores, highest);
                } else if (block + key >= limits.latest) {
                    finish_masked<NV, false>(tile, scores, highest, limits, block + key, added,
                                             group.keys);
                } else {
                    finish_masked<NV, true>(tile, scores, highest, limits, block + key, added,
                                            group.keys);
                }
            }
            vf shift[NV], shrink[NV];
            for (int n = 0; n < NV; ++n) {
                shift[n] =
                    highest[n] == -kInfinity ? vf{} : highest[n];  // -inf: no visible key yet
                shrink[n] = exp2_below(before[n] - shift[n]);
                sum[n] *= shrink[n];
            }
            exponentials<NV>(keys, shift, sum);
            const Word* v = v_ + block / E::kElements * columns_;
            int64_t steps = (keys + E::kElements - 1) / E::kElements;
            for (int64_t d = 0; d < round_up(a_.size, kTileRows); d += kTileRows) {
                Tile<NV> tile;
                load_tile<NV>(tile, out_ + d * kTileLanes, kTileLanes);
                for_tile<NV>([&](int r, int n) { tile[r][n] *= shrink[n]; });
                multiply_add<E, 1>(tile, v + d, columns_, as_words(scores_), kTileLanes, steps);
                store_tile<NV>(tile, out_ + d * kTileLanes, kTileLanes);
            }
        }
        std::memcpy(max_, highest, sizeof highest);
        std::memcpy(sum_, sum, sizeof sum);
    }

    // Scales a tile of scores, stores them and keeps each lane's maximum.
    template <int NV>
    __attribute__((always_inline)) void finish(const Tile<NV>& tile, float* scores,
                                               vf (&highest)[NV]) {
        for_tile<NV>([&](int r, int n) {
            vf score = tile[r][n] * scale_.factor;
            highest[n] = max(highest[n], score);
            store(scores + (r * NV + n) * kWidth, score);
        });
    }

    // The same where something is added to keys, or some lanes do not see all of them.
    template <int NV, bool kStarts>
    __attribute__((always_inline)) void finish_masked(const Tile<NV>& tile, float* scores,
                                                      vf (&highest)[NV], const Limits<NV>& limits,
                                                      int key, const float* added, int64_t keys) {
        for_tile<NV>([&](int r, int n) {
            float more = added && key + r < keys ? added[key + r] : 0.0f;
            vf score = limits.template mask<kStarts>(tile[r][n] * scale_.factor, n, key + r, more);
            highest[n] = max(highest[n], score);
            store(scores + (r * NV + n) * kWidth, score);
        });
    }

    // Scores become 2^(score - shift), in place, as the words that the product with V takes.
    template <int NV>
    void exponentials(int keys, const vf (&shift)[NV], vf (&sum)[NV]) {
        for (int key = 0; key < keys; key += E::kElements) {
            for (int n = 0; n < NV; ++n) {
                const float* from = scores_ + (key * NV + n) * kWidth;
                vf p = exp2_below(load(from) - shift[n]);
                sum[n] += p;
                if constexpr (E::kElements == 1) {
                    store(scores_ + (key * NV + n) * kWidth, p);
                } else {
                    vf next{};
                    if (key + 1 < keys) next = exp2_below(load(from + NV * kWidth) - shift[n]);
                    sum[n] += next;
                    store(scores_ + (key / 2 * NV + n) * kWidth, join_bf16(p, next));
                }
            }
        }
    }

    void write(const Group& group, int64_t first, int64_t rows, int64_t lanes) {
        transpose(as_words(out_), lanes, room_, columns_, columns_, lanes);
        for (int64_t r = 0; r < rows; ++r) {
            float inverse = sum_[r] == 0 ? 0 : 1 / sum_[r];
            a_.statistics[group.statistic(first + r)] = {max_[r], sum_[r]};
            const float* from = as_floats(room_) + r * columns_;
            T* to = static_cast<T*>(a_.out) + group.element(first + r);
            for_vectors(a_.size,
                        [&](int64_t d, int n) { put(to + d, load(from + d) * inverse, n); });
        }
    }

    const AttentionForward& a_;
    const int64_t words_ = row_words<E>(a_.size);        // in a packed row of q or k
    const int64_t columns_ = round_up(a_.size, kWidth);  // in a packed row of v
    const int64_t keys_ = round_up(a_.keys, kTileRows);
    const ScoreScale scale_{a_};
    Words k_{keys_ * words_}, v_{keys_ * columns_}, q_{kLanes * words_}, room_{kLanes * kMaxSize};
    Floats scores_{kKeys * kLanes}, out_{columns_ * kLanes};
    float max_[kLanes], sum_[kLanes];
};

}  // namespace

void attention_prefill(const AttentionForward& args, int64_t shares, int64_t first_task,
                       int64_t last_task) {
    dispatch(args.dtype, [&](auto t) {
        Prefill<decltype(t)> work(args);
        for (int64_t task = first_task; task < last_task; ++task)
            work.task(task / shares, task % shares, shares);
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
