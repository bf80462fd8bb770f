#include "kernels/cpu/select_token.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "simd/math.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

constexpr int64_t kPart = 512;     // candidates whose float sum becomes a double
constexpr int64_t kSorted = 1024;  // as many are sorted; more are narrowed down first
constexpr float kInfinity = __builtin_inff();

// Candidates of one row, in the vocabulary's order: scores, later probabilities times a constant.
class Row {
  public:
    Row(const SelectToken& args, float* floats, int32_t* indices)
        : a_(args),
          x_(floats),
          room_(floats + args.size),
          index_(indices),
          order_(indices + args.size) {}

    int64_t select(int64_t row) {
        size_ = a_.size;
        all_ = true;
        if (!a_.uniform && !a_.present) {
            int64_t found = 0;
            dispatch(a_.dtype, [&](auto t) {
                found = likeliest(static_cast<const decltype(t)*>(a_.logits) + row * size_);
            });
            return found;
        }
        dispatch(a_.dtype, [&](auto t) {
            const auto* logits = static_cast<const decltype(t)*>(a_.logits) + row * size_;
            for_vectors(size_, [&](int64_t i, int n) { put(x_ + i, at(logits + i, n), n); });
        });
        if (a_.present) penalize(a_.present + row * size_);
        if (!a_.uniform) return likeliest(x_);
        if (a_.temperature != 1) {
            for_vectors(size_, [&](int64_t i, int n) {
                put(x_ + i, at(x_ + i, n) / splat(a_.temperature), n);
            });
        }
        highest_ = highest(x_);
        if (!(std::abs(highest_) < kInfinity)) return -1;  // NaN among them
        if (a_.top_k && a_.top_k < size_) keep_top_k();
        exponentials();
        if (a_.top_p < 1) keep_top_p();
        if (a_.min_p > 0) drop_below(a_.min_p);
        int64_t i = draw(a_.uniform[row]);
        return i < 0 || all_ ? i : index_[i];
    }

  private:
    void penalize(const bool* present) {
        auto lower = [&](int64_t i) {
            if (present[i]) x_[i] = x_[i] < 0 ? x_[i] * a_.penalty : x_[i] / a_.penalty;
        };
        int64_t i = 0;
        for (; i + 8 <= size_; i += 8) {  // few are present
            uint64_t eight;
            std::memcpy(&eight, present + i, sizeof eight);
            for (int64_t j = i; eight && j < i + 8; ++j) lower(j);
        }
        for (; i < size_; ++i) lower(i);
    }

    // The largest one; NaN if there is one.
    template <class T>
    float highest(const T* x) const {
        vf top = splat(-kInfinity);
        vi nan{};
        auto take = [&](vf v) {
            nan |= v != v;
            top = max(v, top);  // top where v is NaN
        };
        int64_t i = 0;
        for (; i + kWidth <= size_; i += kWidth) take(load(x + i));
        for (; i < size_; ++i) take(splat(at(x + i, 1)[0]));
        float result = -kInfinity;
        for (int lane = 0; lane < kWidth; ++lane) {
            if (nan[lane]) return __builtin_nanf("");
            result = std::max(result, top[lane]);
        }
        return result;
    }

    // The first one of the largest, or the first NaN, as torch's argmax.
    template <class T>
    int64_t likeliest(const T* x) const {
        float top = highest(x);
        auto found = [=](vf v) { return top == top ? v == top : v != v; };
        int64_t i = 0;
        while (i + kWidth <= size_ && !any(found(load(x + i)))) i += kWidth;
        while (!found(splat(at(x + i, 1)[0]))[0]) ++i;
        return i;
    }

    // ---- top-k

    void keep_top_k() {
        float least = bound();
        compact(least);
        std::copy_n(x_, size_, room_);
        std::nth_element(room_, room_ + a_.top_k - 1, room_ + size_, std::greater<>());
        compact(room_[a_.top_k - 1]);  // what is equal to the last one stays
    }

    // A score that at least top_k candidates reach: the top_k-th of the largest ones of disjoint
    // parts, each a lane of some vectors.
    float bound() {
        int64_t vectors = size_ / kWidth,
                depth = std::min<int64_t>(vectors * kWidth / (4 * a_.top_k), 64), count = 0;
        if (depth < 2) return -kInfinity;
        for (int64_t i = 0; i + depth <= vectors; i += depth, count += kWidth) {
            vf top = load(x_ + i * kWidth);
            for (int64_t j = 1; j < depth; ++j) top = max(top, load(x_ + (i + j) * kWidth));
            store(room_ + count, top);
        }
        if (count < a_.top_k) return -kInfinity;
        std::nth_element(room_, room_ + a_.top_k - 1, room_ + count, std::greater<>());
        return room_[a_.top_k - 1];
    }

    // Keeps the candidates that are at least `least`.
    void compact(float least) {
        int64_t count = 0, i = 0;
        auto take = [&](int64_t j) {
            if (!(x_[j] >= least)) return;
            index_[count] = all_ ? static_cast<int32_t>(j) : index_[j];
            x_[count++] = x_[j];
        };
        for (; i + kWidth <= size_; i += kWidth) {
            if (!any(load(x_ + i) >= least)) continue;
            for (int64_t j = i; j < i + kWidth; ++j) take(j);
        }
        for (; i < size_; ++i) take(i);
        size_ = count;
        all_ = false;
    }

    static bool any(vi mask) {
#if defined(__AVX512F__)
        return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
        return _mm256_movemask_ps(reinterpret_cast<__m256>(mask));
#else
        return mask[0] | mask[1] | mask[2] | mask[3];
#endif
    }

    // ---- probabilities, as multiples of the largest one's

    void exponentials() {
        for_vectors(size_,
                    [&](int64_t i, int n) { put(x_ + i, exp(at(x_ + i, n) - highest_), n); });
    }

    // How many are below a bound, and their sum.
    struct Below {
        int64_t count;
        double sum;
    };
    static Below below(const float* x, int64_t size, float bound) {
        Below found{0, 0};
        vi counts{};
        for (int64_t part = 0; part < size; part += kPart) {
            int64_t end = std::min(part + kPart, size), i = part;
            vf sums{};
            for (; i + kWidth <= end; i += kWidth) {
                vf v = load(x + i);
                vi in = v < bound;
                counts -= in;
                sums += in ? v : vf{};
            }
            found.sum += reduce_add(sums);
            for (; i < end; ++i) {
                if (x[i] < bound) ++found.count, found.sum += x[i];
            }
        }
        for (int lane = 0; lane < kWidth; ++lane) found.count += counts[lane];
        return found;
    }

    // Copies those of x in [low, high), in order; `to` has room for all, and may be x.
    static int64_t copy_between(const float* x, int64_t size, float low, float high, float* to) {
        int64_t count = 0, i = 0;
#if defined(__AVX512F__)
        for (; i + kWidth <= size; i += kWidth) {
            vf v = load(x + i);
            __mmask16 in = _mm512_movepi32_mask(reinterpret_cast<__m512i>((v >= low) & (v < high)));
            store(to + count,
                  reinterpret_cast<vf>(_mm512_maskz_compress_ps(in, reinterpret_cast<__m512>(v))));
            count += __builtin_popcount(in);
        }
#endif
        for (; i < size; ++i) {  // without branches: many may be in and many out
            float v = x[i];
            to[count] = v;
            count += (v >= low) & (v < high);
        }
        return count;
    }

    // Calls body(i) for each of x in [low, high), few of them.
    template <class Body>
    static void for_each_between(const float* x, int64_t size, float low, float high, Body&& body) {
        int64_t i = 0;
        for (; i + kWidth <= size; i += kWidth) {
            vf v = load(x + i);
            if (!any((v >= low) & (v < high))) continue;
            for (int64_t j = i; j < i + kWidth; ++j) {
                if (low <= x[j] && x[j] < high) body(j);
            }
        }
        for (; i < size; ++i) {
            if (low <= x[i] && x[i] < high) body(i);
        }
    }

    // Drops the unlikeliest candidates that add up to 1 - top_p of all or less; one stays. Of equal
    // ones the first are dropped, as a stable sort has them.
    void keep_top_p() {
        // All below `low` are dropped: even as many as there are would not add up to more. None
        // from `high` on is; the largest is 1.
        float high = std::nextafter(1.0f, 2.0f);
        double dropped = (1 - a_.top_p) * below(x_, size_, high).sum;
        float low = std::max(static_cast<float>(dropped / (2.0 * size_)), 0x1p-126f);
        Below under_low = below(x_, size_, low), under_high{size_, 0};
        const float* between = x_;  // has all of [low, high)
        int64_t size = size_;
        Below outside{0, 0};  // what is below `low` and not in `between`
        while (under_high.count - under_low.count > kSorted) {
            float middle = std::sqrt(low) * std::sqrt(high);
            if (!(low < middle && middle < high)) break;  // the others are equal
            Below under = below(between, size, middle);
            under.count += outside.count, under.sum += outside.sum;
            (under.sum <= dropped ? low : high) = middle;
            (under.sum <= dropped ? under_low : under_high) = under;
            if (4 * (under_high.count - under_low.count) < size) {  // look at fewer from now on
                size = copy_between(between, size, low, high, room_);
                between = room_, outside = under_low;
            }
        }
        int64_t count = 0;
        for_each_between(x_, size_, low, high,
                         [&](int64_t i) { order_[count++] = static_cast<int32_t>(i); });
        std::sort(order_, order_ + count,
                  [&](int32_t a, int32_t b) { return x_[a] < x_[b] || (x_[a] == x_[b] && a < b); });
        if (under_high.count == size_) --count;  // the last one of all stays
        drop_below(low);
        double sum = under_low.sum;
        for (int64_t i = 0; i < count; ++i) {
            if ((sum += x_[order_[i]]) > dropped) break;
            x_[order_[i]] = 0;
        }
    }

    void drop_below(float least) {
        for_vectors(size_, [&](int64_t i, int n) {
            vf x = at(x_ + i, n);
            put(x_ + i, x < least ? vf{} : x, n);
        });
    }

    // The first candidate up to which the probabilities add up to more than `uniform` of all.
    int64_t draw(double uniform) const {
        double total = 0;
        for (int64_t part = 0; part < size_; part += kPart) total += sum(part);
        double left = uniform * total;
        int64_t last = -1;
        for (int64_t part = 0; part < size_; part += kPart) {
            double own = sum(part);
            if (own == 0) continue;
            int64_t end = std::min(part + kPart, size_);
            double added = 0;
            for (int64_t i = part; i < end; ++i) {
                if (x_[i] == 0) continue;
                last = i;
                if (left >= own) break;  // not in this part, but there may be no other one
                if ((added += x_[i]) > left) return i;
            }
            left -= own;
        }
        return last;
    }

    double sum(int64_t part) const {
        int64_t size = std::min(kPart, size_ - part);
        vf sums{};
        for_vectors(size, [&](int64_t i, int n) { sums += at(x_ + part + i, n); });
        return reduce_add(sums);
    }

    const SelectToken& a_;
    float *x_, *room_;
    int32_t *index_, *order_;
    int64_t size_ = 0;
    bool all_ = true;  // whether index_ would be 0, 1, 2 ...
    float highest_ = 0;
};

}  // namespace

void select_token(const SelectToken& args, float* floats, int32_t* indices, int64_t first,
                  int64_t last) {
    Row work(args, floats, indices);
    for (int64_t row = first; row < last; ++row) args.tokens[row] = work.select(row);
}

}  // namespace mllama::kernels::MLLAMA_ISA
