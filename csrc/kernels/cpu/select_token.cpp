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
        dispatch(a_.dtype, [&](auto t) {
            const auto* logits = static_cast<const decltype(t)*>(a_.logits) + row * size_;
            for_vectors(size_, [&](int64_t i, int n) { put(x_ + i, at(logits + i, n), n); });
        });
        if (a_.present) penalize(a_.present + row * size_);
        if (!a_.uniform) return likeliest();
        if (a_.temperature != 1) {
            for_vectors(size_, [&](int64_t i, int n) {
                put(x_ + i, at(x_ + i, n) / splat(a_.temperature), n);
            });
        }
        highest_ = highest(x_, size_);
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

    // The largest of them; NaN if there is one.
    static float highest(const float* x, int64_t size) {
        vf top = splat(-kInfinity);
        vi nan{};
        int64_t i = 0;
        for (; i + kWidth <= size; i += kWidth) {
            vf v = load(x + i);
            nan |= v != v;
            top = max(v, top);  // top where v is NaN
        }
        float result = -kInfinity;
        auto take = [&](float one, bool is_nan) {
            if (is_nan || result != result) {
                result = __builtin_nanf("");
            } else {
                result = std::max(result, one);
            }
        };
        for (int lane = 0; lane < kWidth; ++lane) take(top[lane], nan[lane]);
        for (; i < size; ++i) take(x[i], x[i] != x[i]);
        return result;
    }

    // The first one of the largest, or the first NaN, as torch's argmax.
    int64_t likeliest() const {
        float top = highest(x_, size_);
        int64_t i = 0;
        while (top == top ? x_[i] != top : x_[i] == x_[i]) ++i;
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

    // How many candidates are below a bound, and their sum.
    struct Below {
        int64_t count;
        double sum;
    };
    Below below(float bound) const {
        Below found{0, 0};
        vi counts{};
        for (int64_t part = 0; part < size_; part += kPart) {
            int64_t end = std::min(part + kPart, size_), i = part;
            vf sums{};
            for (; i + kWidth <= end; i += kWidth) {
                vf x = load(x_ + i);
                vi in = x < bound;
                counts -= in;
                sums += in ? x : vf{};
            }
            found.sum += reduce_add(sums);
            for (; i < end; ++i) {
                if (x_[i] < bound) ++found.count, found.sum += x_[i];
            }
        }
        for (int lane = 0; lane < kWidth; ++lane) found.count += counts[lane];
        return found;
    }

    // Drops the unlikeliest candidates that add up to 1 - top_p of all or less; one stays. Of equal
    // ones the first are dropped, as a stable sort has them.
    void keep_top_p() {
        float high = std::nextafter(1.0f, 2.0f);  // the largest is 1
        double dropped = (1 - a_.top_p) * below(high).sum;
        // All below `low` are dropped: even if all candidates were, they would not add up to more.
        // None from `high` on is.
        float low = std::max(static_cast<float>(dropped / (2.0 * size_)), 0x1p-126f);
        Below under_low = below(low), under_high = below(high);
        while (under_high.count - under_low.count > kSorted) {
            float middle = std::sqrt(low) * std::sqrt(high);
            if (!(low < middle && middle < high)) break;  // the others are equal
            Below under = below(middle);
            if (under.sum <= dropped) {
                low = middle, under_low = under;
            } else {
                high = middle, under_high = under;
            }
        }
        int64_t count = 0;
        for (int64_t i = 0; i < size_; ++i) {
            if (low <= x_[i] && x_[i] < high) order_[count++] = static_cast<int32_t>(i);
        }
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
