// The forward pass for few queries (generation): memory speed. Every thread reads chunks of K and V
// once, in place, for all queries of a key head; the chunks' results are merged by their
// log-sum-exp.
#include "kernels/cpu/attention.h"
#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/quantized_rows.h"
#include "simd/bytes.h"
#include "simd/sums.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

// M query rows share one pass over a chunk. A vector of scores holds kWidth / M keys, the M rows of
// a key side by side.
constexpr int kMostRows = 4;
constexpr int kValueVectors =
    kWidth == 16 ? 4 : 2;  // f32 vectors of V in one pass: kMostRows times as many sums

// Number of elements that a row has left in a step.
inline int in_step(int64_t left, int step) {
    return static_cast<int>(std::clamp<int64_t>(left, 0, step));
}

// How rows of K meet rows of Q, and rows of V their probabilities: widened to f32 from any
// dtype.
template <class T>
struct Widened {
    using Input = T;  // of q and the output
    using Query = float;
    static constexpr int kStep = kWidth;  // elements of a row in one vector
    static constexpr int kKeys = 1;       // keys that one step of the product with V takes

    static int64_t length(int64_t size) { return size; }  // of a row of K or V, in T
    static vf query(const float* q) { return load(q); }
    static vf key(const T* row, int64_t d, int n, int64_t) { return at(row + d, n); }
    static vf multiply_add(vf a, vf b, vf sum) { return a * b + sum; }
    static vf probability(const float* p) { return splat(*p); }

    // kVectors f32 vectors of a row of V from d on.
    template <int kVectors>
    static void values(const T* row, const T*, int64_t d, int64_t size, vf (&x)[kVectors]) {
        for (int i = 0; i < kVectors; ++i)
            x[i] = at(row + d + i * kWidth, in_step(size - d - i * kWidth, kWidth));
    }
    template <int kVectors>
    static void put_sums(float* out, const vf (&sum)[kVectors]) {
        for (int i = 0; i < kVectors; ++i) store(out + i * kWidth, sum[i]);
    }
};

template <class T>
struct RowsOf {
    using type = Widened<T>;
};

// Codes with a scale for every group of them, widened to f32.
struct Quantized : Widened<float> {
    static int64_t length(int64_t size) { return quantized_row_bytes(size); }
    static vf key(const int8_t* row, int64_t d, int n, int64_t size) {
        return load_codes(row + d, n) * splat_bf16(row + size + d / kRowGroup * 2);
    }
    template <int kVectors>
    static void values(const int8_t* row, const int8_t*, int64_t d, int64_t size,
                       vf (&x)[kVectors]) {
        for (int i = 0; i < kVectors; ++i) {
            int n = in_step(size - d - i * kWidth, kWidth);
            x[i] = n ? key(row, d + i * kWidth, n, size) : vf{};
        }
    }
};
template <>
struct RowsOf<int8_t> {
    using type = Quantized;
};

#if defined(__AVX512BF16__)
// bf16 in pairs: neighbors in a row of K, two rows of V zipped together.
struct Paired {
    using Input = bf16;
    using Query = bf16;
    static constexpr int kStep = 32;
    static constexpr int kKeys = 2;

    static int64_t length(int64_t size) { return size; }
    static vf query(const bf16* q) { return pairs(q, kStep); }
    static vf key(const bf16* row, int64_t d, int n, int64_t) { return pairs(row + d, n); }
    static vf pairs(const bf16* k, int n) {
        return reinterpret_cast<vf>(n == kStep
                                        ? _mm512_loadu_si512(k)
                                        : _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, k));
    }
    static vf multiply_add(vf a, vf b, vf sum) { return Bf16Words::multiply_add(a, b, sum); }
    static vf probability(const float* p) { return Bf16Words::broadcast(p); }

    template <int kVectors>
    static void values(const bf16* low, const bf16* high, int64_t d, int64_t size,
                       vf (&x)[kVectors]) {
        static_assert(kVectors % 2 == 0);
        for (int i = 0; i < kVectors; i += 2) {
            int64_t at = d + i * kWidth;
            int n = in_step(size - at, kStep);
            __m512i a = reinterpret_cast<__m512i>(pairs(low + at, n)),
                    b = reinterpret_cast<__m512i>(pairs(high + at, n));
            x[i] = reinterpret_cast<vf>(_mm512_unpacklo_epi16(a, b));
            x[i + 1] = reinterpret_cast<vf>(_mm512_unpackhi_epi16(a, b));
        }
    }
    // Zipping works inside 128-bit parts, so the sums' parts stand in the order 0 2 4 6, 1 3 5 7.
    template <int kVectors>
    static void put_sums(float* out, const vf (&sum)[kVectors]) {
        for (int i = 0; i < kVectors; i += 2) {
            for (int part = 0; part < 4; ++part) {
                const char *even = reinterpret_cast<const char*>(&sum[i]),
                           *odd = reinterpret_cast<const char*>(&sum[i + 1]);
                std::memcpy(out + i * kWidth + part * 8, even + part * 16, 16);
                std::memcpy(out + i * kWidth + part * 8 + 4, odd + part * 16, 16);
            }
        }
    }
};
template <>
struct RowsOf<bf16> {
    using type = Paired;
};
#endif

template <class T>  // an element of K and V
class Decode {
    using Rows = typename RowsOf<T>::type;
    using Input = typename Rows::Input;
    using Query = typename Rows::Query;
    static constexpr int64_t kRoom =
        kMaxSize + Rows::kStep;  // a row of Q or of sums, padded to whole steps

  public:
    explicit Decode(const AttentionForward& args) : a_(args) {}

    // partial: [rows] of the maximal score, the sum of 2^(score - maximum) and the sums of V
    // weighed with those.
    void task(int64_t index, int64_t chunk, float* partial) {
        Group group(a_, index);
        for (int64_t row = 0, rows = 0; row < a_.rows(); row += rows) {
            // Of one query, so that its bits do not depend on the queries beside it.
            rows = std::min<int64_t>(kMostRows, a_.group_size() - row % a_.group_size());
            first_ = std::max(chunk * kDecodeChunk, group.visible.first + group.start(row));
            int64_t end = group.visible.first + group.limit(row + rows - 1);
            keys_ = std::min((chunk + 1) * kDecodeChunk, end) - first_;
            float* to = partial + row * (a_.size + 2);
            if (keys_ <= 0) {
                for (int64_t r = 0; r < rows; ++r, to += a_.size + 2) to[0] = -kInfinity, to[1] = 0;
            } else if (rows > 2) {  // three as four, the last one twice
                pass<4>(group, row, rows, to);
            } else if (rows == 2) {
                pass<2>(group, row, rows, to);
            } else {
                pass<1>(group, row, rows, to);
            }
        }
    }

  private:
    template <int M>
    void pass(const Group& group, int64_t first_row, int64_t rows, float* partial) {
        auto row_of = [&](int m) { return first_row + std::min<int64_t>(m, rows - 1); };
        auto q_row = group.query_rows<Input>(a_.q, 0);
        for (int m = 0; m < M; ++m) pack_query(q_row(row_of(m)), queries_ + m * kRoom);
        auto k_row = group.key_rows<T>(a_.k), v_row = group.key_rows<T>(a_.v);
        int64_t skipped = first_ - group.visible.first;
        scores<M>(k_row(skipped));

        // Lanes hold kWidth / M keys by M rows, so that maxima and sums of a row are first taken
        // lane by lane.
        // Each lane's first key, counted from its row's start, and the number of keys visible to
        // the row.
        uint32_t key[kWidth], count[kWidth];
        for (int m = 0; m < M; ++m) {
            int64_t start = group.start(row_of(m)) - skipped;
            int64_t limit = std::min(group.limit(row_of(m)) - skipped, keys_);
            for (int i = m; i < kWidth; i += M) {
                key[i] = static_cast<uint32_t>(i / M - start);
                count[i] = static_cast<uint32_t>(std::max<int64_t>(limit - start, 0));
            }
        }
        float lanes[kWidth], highest[M], total[M]{};
        store(lanes, mask<M>(group.visible.added, key, count));
        for (int i = 0; i < kWidth; ++i)
            highest[i % M] = i < M ? lanes[i] : std::max(highest[i % M], lanes[i]);
        for (int i = 0; i < kWidth; ++i)
            lanes[i] = highest[i % M] == -kInfinity ? 0 : highest[i % M];
        store(lanes, exponentials<M>(load(lanes)));
        for (int i = 0; i < kWidth; ++i) total[i % M] += lanes[i];

        const T* v = v_row(skipped);
        int64_t d = 0;
        // Prefetch the next chunk's keys while V is summed, which needs less memory bandwidth than
        // the scores do.
        const T* next = a_.k.length == length_ ? k_row(skipped + keys_) : nullptr;
        for (; d + (kValueVectors - 2) * kWidth < a_.size;
             d += kValueVectors * kWidth, next = nullptr)
            weigh<M, kValueVectors>(v, d, next);
        for (; d < a_.size; d += 2 * kWidth, next = nullptr) weigh<M, 2>(v, d, next);
        for (int64_t r = 0; r < rows; ++r, partial += a_.size + 2) {
            partial[0] = highest[r];
            partial[1] = total[r];
            std::memcpy(partial + 2, sums_ + r * kRoom, a_.size * sizeof(float));
        }
    }

    void pack_query(const Input* q, Query* to) const {
        if constexpr (std::is_same_v<Query, float>) {
            widen_row(q, to, a_.size, round_up(a_.size, kWidth));
        } else {
            std::memcpy(to, q, a_.size * sizeof(Input));
            std::memset(to + a_.size, 0, Rows::kStep * sizeof(Input));
        }
    }

    // scores_[key][M] = q k' in log2 units.
    template <int M>
    void scores(const T* k) {
        constexpr int kTile = kWidth / M;  // keys
        const float factor = scale_.capped ? scale_.inner : scale_.factor;
        for (int64_t key = 0; key < keys_; key += kTile) {
            const T* rows = k + key * a_.k.length;
            int64_t stride = a_.k.length;
            T copy[kTile * kLongest];
            if (key + kTile > keys_) {  // do not read past the last key: repeat it
                for (int64_t i = 0; i < kTile; ++i) {
                    std::memcpy(copy + i * kLongest, rows + std::min(i, keys_ - key - 1) * stride,
                                length_ * sizeof(T));
                }
                rows = copy;
                stride = kLongest;
            } else {
                prefetch(rows + 4 * kTile * stride, stride, kTile);
            }
            vf acc[kWidth]{};
            for (int64_t d = 0; d < a_.size; d += Rows::kStep) {
                int n = in_step(a_.size - d, Rows::kStep);
                vf q[M];
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) q[m] = Rows::query(queries_ + m * kRoom + d);
#pragma GCC unroll 16
                for (int i = 0; i < kTile; ++i) {
                    vf x = Rows::key(rows + i * stride, d, n, a_.size);
#pragma GCC unroll 4
                    for (int m = 0; m < M; ++m)
                        acc[i * M + m] = Rows::multiply_add(x, q[m], acc[i * M + m]);
                }
            }
            store(scores_ + key * M, sum_each(acc) * factor);
        }
        if (scale_.capped) cap_scores(keys_ * M);
    }

    // A separate loop, because tanh's constants would push the sums above out of registers.
    __attribute__((noinline)) void cap_scores(int64_t size) {
        for (int64_t i = 0; i < size; i += kWidth)
            store(scores_ + i, tanh(load(scores_ + i)) * scale_.factor);
    }

    // Adds biases, hides keys that are not visible; returns each lane's maximum.
    template <int M>
    vf mask(const float* added, const uint32_t* key_of, const uint32_t* count_of) {
        vu key, count;
        std::memcpy(&key, key_of, sizeof key);
        std::memcpy(&count, count_of, sizeof count);
        if (added) {
            for (int64_t i = 0; i < keys_ * M; ++i) {
                float more = added[first_ + i / M];
                scores_[i] = more == -kInfinity
                                 ? more
                                 : scores_[i] + more;  // a hidden key's score may be NaN
            }
        }
        vf highest = splat(-kInfinity);
        for (int64_t i = 0; i < keys_ * M; i += kWidth) {
            // One comparison for both ends: positions before the start are huge as unsigned.
            vf score =
                key + static_cast<uint32_t>(i / M) < count ? load(scores_ + i) : splat(-kInfinity);
            highest = max(highest, score);
            store(scores_ + i, score);
        }
        return highest;
    }

    // Scores become 2^(score - shift), as the product with V takes them; returns each lane's sum.
    template <int M>
    vf exponentials(vf shift) {
        int64_t size = round_up(keys_ * M, kWidth);
        vf sum{};
        for (int64_t i = 0; i < size; i += kWidth) {
            vf p = exp2_below(load(scores_ + i) - shift);
            sum += p;
            store(scores_ + i, p);
        }
        if constexpr (Rows::kKeys == 2) {  // beside each even key's the next key's, as words
            store(scores_ + size, vf{});
            for (int64_t i = 0; i < size; i += kWidth) {
                store(scores_ + i, join_bf16(load(scores_ + i), load(scores_ + i + M)));
            }
        }
        return sum;
    }

    // sums_[M][d ..] = probabilities times kVectors vectors of V. Fetches as many rows from `next`,
    // unless null.
    template <int M, int kVectors>
    void weigh(const T* v, int64_t d, const T* next) {
        const T* row = v;
        int64_t stride = a_.v.length;
        vf sum[M][kVectors]{};
        for (int64_t key = 0; key < keys_; key += Rows::kKeys, row += Rows::kKeys * stride) {
            prefetch(row + 16 * stride, stride, Rows::kKeys);
            if (next) fetch(next + key * length_, length_, Rows::kKeys);
            vf x[kVectors];
            // An odd last key is paired with itself, with probability 0.
            Rows::values(row, key + 1 < keys_ ? row + stride : row, d, a_.size, x);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                vf p = Rows::probability(scores_ + key * M + m);
#pragma GCC unroll 4
                for (int i = 0; i < kVectors; ++i)
                    sum[m][i] = Rows::multiply_add(p, x[i], sum[m][i]);
            }
        }
        for (int m = 0; m < M; ++m) Rows::put_sums(sums_ + m * kRoom + d, sum[m]);
    }

    // The hardware prefetcher does not handle rows that are apart in memory.
    void prefetch(const T* row, int64_t stride, int rows) const {
        if (stride != length_) fetch(row, stride, rows);
    }
    void fetch(const T* row, int64_t stride, int rows) const {
        for (int i = 0; i < rows; ++i, row += stride) {
            for (int64_t d = 0; d < length_; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
        }
    }

    static constexpr int64_t kLongest = kMaxSize + 16;  // room for a row of codes and scales

    const AttentionForward& a_;
    const ScoreScale scale_{a_};
    const int64_t length_ = Rows::length(a_.size);  // of a dense row of K or V
    int64_t first_, keys_;  // the keys of this chunk visible to some row of the pass
    alignas(64) Query queries_[kMostRows * kRoom];
    alignas(64) float scores_[kDecodeChunk * kMostRows + 2 * kWidth];
    alignas(64) float sums_[kMostRows * kRoom];
};

// Merges the chunks' results of one row to its output.
template <class T>
void merge_row(const AttentionForward& a, const Group& group, int64_t row, const float* partial) {
    const int64_t chunks = a.chunks, stride = attention_chunk_size(a);
    float highest = -kInfinity, total = 0, sums[kMaxSize + kWidth]{};
    for (int64_t c = 0; c < chunks; ++c) highest = std::max(highest, partial[c * stride]);
    for (int64_t c = 0; c < chunks; ++c) {
        const float* one = partial + c * stride;
        if (one[1] == 0)
            continue;  // no visible key: its sums are not written. one[0] may have lost a NaN
        float weight = exp2_below(splat(one[0] - highest))[0];
        total += weight * one[1];
        for_vectors(a.size, [&](int64_t d, int n) {
            put(sums + d, load(sums + d) + at(one + 2 + d, n) * weight, n);
        });
    }
    a.statistics[group.statistic(row)] = {highest, total};
    float inverse = total == 0 ? 0 : 1 / total;
    T* out = static_cast<T*>(a.out) + group.element(row);
    for_vectors(a.size, [&](int64_t d, int n) { put(out + d, load(sums + d) * inverse, n); });
}

}  // namespace

void attention_decode(const AttentionForward& args, float* partial, int64_t first_task,
                      int64_t last_task) {
    auto decode = [&](auto t) {
        Decode<decltype(t)> work(args);
        int64_t size = attention_chunk_size(args);
        for (int64_t task = first_task; task < last_task; ++task)
            work.task(task / args.chunks, args.first_chunk + task % args.chunks,
                      partial + task * size);
    };
    args.quantized ? decode(int8_t{}) : dispatch(args.dtype, decode);
}

void attention_merge(const AttentionForward& args, const float* partial, int64_t first_group,
                     int64_t last_group) {
    dispatch(args.dtype, [&](auto t) {
        for (int64_t index = first_group; index < last_group; ++index) {
            const float* from = partial + index * args.chunks * attention_chunk_size(args);
            for (int64_t row = 0; row < args.rows(); ++row) {
                merge_row<decltype(t)>(args, Group(args, index), row, from + row * (args.size + 2));
            }
        }
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
