// The forward pass for few queries (generation): memory speed. Every thread reads chunks of K and V once, in place, for
// all queries of a key head; the chunks' results are merged by their log-sum-exp.
#include <algorithm>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/attention_tiles.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

// M query rows share one pass over a chunk. A vector of scores holds kWidth / M keys, the M rows of a key side by side.
constexpr int kMostRows = 4;
constexpr int kValueVectors = kWidth == 16 ? 4 : 2;  // f32 vectors of V in one pass: kMostRows times as many sums

// How many of a step's elements a row still has.
inline int in_step(int64_t left, int step) { return static_cast<int>(std::clamp<int64_t>(left, 0, step)); }

// How rows of K meet rows of Q, and rows of V their probabilities: widened to f32, whatever the memory holds.
template <class T>
struct Widened {
    using Query = float;
    static constexpr int kStep = kWidth;  // elements of a row in one vector
    static constexpr int kKeys = 1;       // keys that one step of the product with V takes

    static vf query(const float* q) { return load(q); }
    static vf key(const T* k, int n) { return at(k, n); }
    static vf multiply_add(vf a, vf b, vf sum) { return a * b + sum; }
    static vf probability(const float* p) { return splat(*p); }

    // kVectors f32 vectors of V from d on, `left` elements before the row ends.
    template <int kVectors>
    static void values(const T* row, const T*, int64_t left, vf (&x)[kVectors]) {
        for (int i = 0; i < kVectors; ++i) x[i] = at(row + i * kWidth, in_step(left - i * kWidth, kWidth));
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

#if defined(__AVX512BF16__)
// bf16 in pairs: neighbours in a row of K, two rows of V zipped together.
struct Paired {
    using Query = bf16;
    static constexpr int kStep = 32;
    static constexpr int kKeys = 2;

    static vf query(const bf16* q) { return key(q, kStep); }
    static vf key(const bf16* k, int n) {
        return reinterpret_cast<vf>(n == kStep ? _mm512_loadu_si512(k)
                                               : _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, k));
    }
    static vf multiply_add(vf a, vf b, vf sum) { return Pairs::multiply_add(a, b, sum); }
    static vf probability(const float* p) { return Pairs::broadcast(reinterpret_cast<const Word*>(p)); }

    template <int kVectors>
    static void values(const bf16* low, const bf16* high, int64_t left, vf (&x)[kVectors]) {
        static_assert(kVectors % 2 == 0);
        for (int i = 0; i < kVectors; i += 2) {
            int n = in_step(left - i * kWidth, kStep);
            __m512i a = reinterpret_cast<__m512i>(key(low + i * kWidth, n)),
                    b = reinterpret_cast<__m512i>(key(high + i * kWidth, n));
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

// Lane i of the result is the sum of the lanes of acc[i].
inline __attribute__((always_inline)) vf sum_each(const vf (&acc)[kWidth]) {
#if defined(__AVX512F__)
    // Halving steps: each adds the two halves of two vectors and leaves both results in one.
    vf x[8], y[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        __m512 a = reinterpret_cast<__m512>(acc[2 * i]), b = reinterpret_cast<__m512>(acc[2 * i + 1]);
        x[i] = reinterpret_cast<vf>(_mm512_unpacklo_ps(a, b)) + reinterpret_cast<vf>(_mm512_unpackhi_ps(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        __m512d a = reinterpret_cast<__m512d>(x[2 * i]), b = reinterpret_cast<__m512d>(x[2 * i + 1]);
        y[i] = reinterpret_cast<vf>(_mm512_unpacklo_pd(a, b)) + reinterpret_cast<vf>(_mm512_unpackhi_pd(a, b));
    }
    auto parts = [](vf first, vf second) {  // of 128 bits: 0 + 1 and 2 + 3 of both
        __m512 a = reinterpret_cast<__m512>(first), b = reinterpret_cast<__m512>(second);
        return reinterpret_cast<vf>(_mm512_shuffle_f32x4(a, b, 0x88)) +
               reinterpret_cast<vf>(_mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return parts(parts(y[0], y[1]), parts(y[2], y[3]));
#elif defined(__AVX2__)
    auto pair = [](vf a, vf b) {
        return reinterpret_cast<vf>(_mm256_hadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
    };
    __m256 a = reinterpret_cast<__m256>(pair(pair(acc[0], acc[1]), pair(acc[2], acc[3])));
    __m256 b = reinterpret_cast<__m256>(pair(pair(acc[4], acc[5]), pair(acc[6], acc[7])));
    return reinterpret_cast<vf>(_mm256_permute2f128_ps(a, b, 0x20)) +
           reinterpret_cast<vf>(_mm256_permute2f128_ps(a, b, 0x31));
#else
    vf sums;
    for (int i = 0; i < kWidth; ++i) sums[i] = reduce_add(acc[i]);
    return sums;
#endif
}

template <class T>
class Decode {
    using Rows = typename RowsOf<T>::type;
    using Query = typename Rows::Query;
    static constexpr int64_t kRoom = kMaxSize + 32;  // a row of Q or of sums, padded to whole steps

  public:
    explicit Decode(const AttentionForward& args) : a_(args), scale_(args.scale * kLog2e) {}

    void task(int64_t pair, int64_t chunk, float* partial) {
        batch_ = pair / a_.kv_heads;
        head_ = pair % a_.kv_heads;
        const VisibleKeys& visible = a_.visible[batch_];
        int64_t group = a_.group();
        for (int64_t row = 0; row < a_.rows();) {
            int64_t left = a_.rows() - row;
            int rows = left > 2 ? 4 : static_cast<int>(left);
            int64_t last = std::min(row + rows, a_.rows()) - 1;
            first_ = std::max(chunk * kDecodeChunk, visible.first);
            keys_ = std::min((chunk + 1) * kDecodeChunk, visible.limit(last / group)) - first_;
            float* to = partial + row * (a_.size + 2);
            if (keys_ <= 0) {
                for (int64_t r = row; r <= last; ++r, to += a_.size + 2) to[0] = -kInfinity, to[1] = 0;
            } else if (rows == 4) {
                pass<4>(row, to);
            } else if (rows == 2) {
                pass<2>(row, to);
            } else {
                pass<1>(row, to);
            }
            row += rows;
        }
    }

  private:
    template <int M>
    void pass(int64_t first_row, float* partial) {
        pack_queries<M>(first_row);
        scores<M>();
        vf highest = mask<M>(first_row), sum{};
        float lanes[kWidth], most[M], total[M]{};
        store(lanes, highest);
        for (int i = 0; i < kWidth; ++i) most[i % M] = i < M ? lanes[i] : std::max(most[i % M], lanes[i]);
        for (int i = 0; i < kWidth; ++i) lanes[i] = most[i % M] == -kInfinity ? 0 : most[i % M];
        vf shift = load(lanes);
        int64_t size = round_up(keys_ * M, kWidth);
        for (int64_t i = 0; i < size; i += kWidth) {
            vf p = exp2_below(load(scores_ + i) - shift);
            sum += p;
            store(scores_ + i, p);
        }
        store(lanes, sum);
        for (int i = 0; i < kWidth; ++i) total[i % M] += lanes[i];
        if constexpr (Rows::kKeys == 2) {  // each even key's probability beside the next one's, as words
            store(scores_ + size, vf{});
            for (int64_t i = 0; i < size; i += kWidth)
                store(scores_ + i, join_pairs(load(scores_ + i), load(scores_ + i + M)));
        }
        int64_t d = 0;
        for (; d + (kValueVectors - 2) * kWidth < a_.size; d += kValueVectors * kWidth) weigh<M, kValueVectors>(d);
        for (; d < a_.size; d += 2 * kWidth) weigh<M, 2>(d);
        for (int r = 0; r < M && first_row + r < a_.rows(); ++r, partial += a_.size + 2) {
            partial[0] = most[r];
            partial[1] = total[r];
            std::memcpy(partial + 2, sums_ + r * kRoom, a_.size * sizeof(float));
        }
    }

    template <int M>
    void pack_queries(int64_t first_row) {
        for (int64_t r = 0; r < M; ++r) {
            int64_t row = std::min(first_row + r, a_.rows() - 1), group = a_.group();
            const T* q = static_cast<const T*>(a_.q.data) + batch_ * a_.q.batch + row / group * a_.q.length +
                         (head_ * group + row % group) * a_.q.head;
            Query* to = queries_ + r * kRoom;
            if constexpr (Rows::kKeys == 1) {
                widen_row(q, to, a_.size, round_up(a_.size, kWidth));
            } else {
                std::memcpy(to, q, a_.size * sizeof(T));
                std::memset(to + a_.size, 0, Rows::kStep * sizeof(T));
            }
        }
    }

    // scores_[key][M] = q k' in log2 units.
    template <int M>
    void scores() {
        constexpr int kTile = kWidth / M;  // keys
        const T* k = row_of(a_.k, 0);
        for (int64_t key = 0; key < keys_; key += kTile) {
            const T* rows = k + key * a_.k.length;
            int64_t stride = a_.k.length;
            T copy[kTile * kMaxSize];
            if (key + kTile > keys_) {  // past the last key lies nobody's memory
                std::memset(copy, 0, sizeof copy);
                for (int64_t i = 0; i < keys_ - key; ++i)
                    std::memcpy(copy + i * kMaxSize, rows + i * stride, a_.size * sizeof(T));
                rows = copy;
                stride = kMaxSize;
            }
            prefetch(rows + 4 * kTile * stride, stride, kTile);
            vf acc[kWidth]{};
            for (int64_t d = 0; d < a_.size; d += Rows::kStep) {
                int n = in_step(a_.size - d, Rows::kStep);
                vf q[M];
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) q[m] = Rows::query(queries_ + m * kRoom + d);
#pragma GCC unroll 16
                for (int i = 0; i < kTile; ++i) {
                    vf x = Rows::key(rows + i * stride + d, n);
#pragma GCC unroll 4
                    for (int m = 0; m < M; ++m) acc[i * M + m] = Rows::multiply_add(x, q[m], acc[i * M + m]);
                }
            }
            store(scores_ + key * M, sum_each(acc) * scale_);
        }
    }

    // Adds what is added to keys, hides what rows do not see; returns the maximum of each lane.
    template <int M>
    vf mask(int64_t first_row) {
        const VisibleKeys& visible = a_.visible[batch_];
        int32_t key_of[kWidth], limit_of[kWidth];
        for (int i = 0; i < kWidth; ++i) {
            int64_t row = std::min(first_row + i % M, a_.rows() - 1);
            key_of[i] = i / M;
            limit_of[i] = static_cast<int32_t>(std::min(visible.limit(row / a_.group()) - first_, keys_));
        }
        vi key, limit;
        std::memcpy(&key, key_of, sizeof key);
        std::memcpy(&limit, limit_of, sizeof limit);
        if (visible.added) {
            for (int64_t i = 0; i < keys_ * M; ++i) scores_[i] += visible.added[first_ + i / M];
        }
        vf highest = splat(-kInfinity);
        for (int64_t i = 0; i < keys_ * M; i += kWidth) {
            vf score = key + static_cast<int32_t>(i / M) < limit ? load(scores_ + i) : splat(-kInfinity);
            highest = max(highest, score);
            store(scores_ + i, score);
        }
        return highest;
    }

    // sums_[M][d ..] = probabilities times kVectors vectors of V.
    template <int M, int kVectors>
    void weigh(int64_t d) {
        const T* row = row_of(a_.v, d);
        int64_t stride = a_.v.length, left = a_.size - d;
        vf sum[M][kVectors]{};
        for (int64_t key = 0; key < keys_; key += Rows::kKeys, row += Rows::kKeys * stride) {
            vf x[kVectors];
            prefetch(row + 16 * stride, stride, Rows::kKeys);
            // An odd last key meets itself, with probability 0.
            Rows::values(row, key + 1 < keys_ ? row + stride : row, left, x);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                vf p = Rows::probability(scores_ + key * M + m);
#pragma GCC unroll 4
                for (int i = 0; i < kVectors; ++i) sum[m][i] = Rows::multiply_add(p, x[i], sum[m][i]);
            }
        }
        for (int m = 0; m < M; ++m) Rows::put_sums(sums_ + m * kRoom + d, sum[m]);
    }

    // Rows that do not follow each other in memory are more than the hardware foresees.
    void prefetch(const T* row, int64_t stride, int rows) const {
        if (stride == a_.size) return;
        for (int i = 0; i < rows; ++i, row += stride) {
            for (int64_t d = 0; d < a_.size; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
        }
    }

    const T* row_of(const Heads& t, int64_t d) const {
        return static_cast<const T*>(t.data) + batch_ * t.batch + first_ * t.length + head_ * t.head + d;
    }

    const AttentionForward& a_;
    const float scale_;
    int64_t batch_, head_, first_, keys_;  // the keys of this chunk that some row sees
    alignas(64) Query queries_[kMostRows * kRoom];
    alignas(64) float scores_[kDecodeChunk * kMostRows + 2 * kWidth];
    alignas(64) float sums_[kMostRows * kRoom];
};

}  // namespace

void attention_decode(const AttentionForward& args, float* partial, int64_t first_task, int64_t last_task) {
    dispatch(args.dtype, [&](auto t) {
        Decode<decltype(t)> work(args);
        int64_t chunks = attention_chunks(args);
        for (int64_t task = first_task; task < last_task; ++task) {
            work.task(task / chunks, task % chunks, partial + task * attention_chunk_size(args));
        }
    });
}

void attention_merge(const AttentionForward& args, const float* partial, int64_t first_pair, int64_t last_pair) {
    int64_t chunks = attention_chunks(args), group = args.group(), width = args.size + 2;
    for (int64_t pair = first_pair; pair < last_pair; ++pair) {
        for (int64_t row = 0; row < args.rows(); ++row) {
            const float* from = partial + pair * chunks * attention_chunk_size(args) + row * width;
            float highest = -kInfinity, total = 0, sums[kMaxSize + kWidth]{};
            for (int64_t c = 0; c < chunks; ++c) highest = std::max(highest, from[c * attention_chunk_size(args)]);
            for (int64_t c = 0; c < chunks; ++c) {
                const float* one = from + c * attention_chunk_size(args);
                if (one[0] == -kInfinity) continue;  // saw nothing: its sums were not written
                float weight = exp2_below(splat(one[0] - highest))[0];
                total += weight * one[1];
                for_vectors(args.size,
                            [&](int64_t d, int n) { put(sums + d, load(sums + d) + at(one + 2 + d, n) * weight, n); });
            }
            int64_t batch = pair / args.kv_heads, head = pair % args.kv_heads * group + row % group,
                    query = row / group;
            args.lse[(batch * args.heads + head) * args.queries + query] =
                total == 0 ? -kInfinity : (highest + __builtin_log2f(total)) * kLn2;
            float inverse = total == 0 ? 0 : 1 / total;
            dispatch(args.dtype, [&](auto t) {
                auto* out = static_cast<decltype(t)*>(args.out) +
                            ((batch * args.queries + query) * args.heads + head) * args.size;
                for_vectors(args.size, [&](int64_t d, int n) { put(out + d, load(sums + d) * inverse, n); });
            });
        }
    }
}

}  // namespace mllama::kernels::MLLAMA_ISA
