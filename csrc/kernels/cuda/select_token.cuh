// A block has a row. Scores, later probabilities as multiples of the largest one's, are in scratch.
// A thread has every kSelectThreads-th of them, or, where their order counts, a chunk. Bounds are
// found by bisection over bits, with sums of float64 in a fixed order, of what is still undecided.
#pragma once

#include "kernels/cpu/select_token.h"
#include "kernels/cuda/device.cuh"

namespace mllama::cuda {

// Loops over a block's threads are unrolled twice only: more would spill registers.
constexpr int kSelectWarps = 8, kSelectThreads = 32 * kSelectWarps;

// An integer with the order of floats; NaN is the largest, and both zeros are equal.
MLLAMA_DEVICE uint32_t order_of(float v) {
    if (v != v) return 0xffffffffu;
    uint32_t bits = __float_as_uint(v + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// What bounds are found among: keys of scores, and what counts for each.
struct CountByScore {
    using Weight = int;
    MLLAMA_DEVICE static uint32_t key(float x) { return order_of(x); }
    MLLAMA_DEVICE static int weight(float) { return 1; }
};
struct SumOfProbabilities {  // which are positive: their bits have their order
    using Weight = double;
    MLLAMA_DEVICE static uint32_t key(float x) { return __float_as_uint(x); }
    MLLAMA_DEVICE static double weight(float x) { return x; }
};

class RowSelection {
  public:
    // scratch: [2, size]
    MLLAMA_DEVICE RowSelection(const kernels::SelectToken& a, float* scratch, int64_t row)
        : a_(a),
          x_(scratch),
          open_(scratch + a.size),
          row_(row),
          chunk_((a.size + kSelectThreads - 1) / kSelectThreads) {}

    // The token, in thread 0.
    template <class T>
    MLLAMA_DEVICE int64_t select() {
        uint64_t best = load_scores<T>();
        int64_t likeliest = static_cast<uint32_t>(~best);
        if (!a_.uniform) return likeliest;
        float highest = x_[likeliest];
        if (!(fabsf(highest) < __uint_as_float(0x7f800000u))) return -1;  // NaN among them
        uint32_t least = a_.top_k && a_.top_k < a_.size ? top_k_bound() : 0;
        __syncthreads();  // all have read x[likeliest]
        for_own([&](float& x) { x = order_of(x) < least ? 0.0f : expf(x - highest); });
        if (a_.top_p < 1) keep_top_p();
        if (a_.min_p > 0) for_own([&](float& x) { x = x < a_.min_p ? 0.0f : x; });
        return draw();
    }

  private:
    template <class Body>
    MLLAMA_DEVICE void for_own(Body&& body) const {
        for (int64_t i = threadIdx.x; i < a_.size; i += kSelectThreads) body(x_[i]);
    }
    template <class Body>
    MLLAMA_DEVICE void for_chunk(Body&& body) const {
        int64_t first = threadIdx.x * chunk_, last = first + chunk_;
        for (int64_t i = first; i < last && i < a_.size; ++i) body(x_[i]);
    }

    // Returns the order of the largest and, so that the first one wins, its inverted place.
    template <class T>
    MLLAMA_DEVICE uint64_t load_scores() const {
        const T* logits = static_cast<const T*>(a_.logits) + row_ * a_.size;
        const bool* present = a_.present ? a_.present + row_ * a_.size : nullptr;
        uint64_t best = 0;
        for (int64_t i = threadIdx.x; i < a_.size; i += kSelectThreads) {
            float v = to_float(logits[i]);
            if (present && present[i]) v = v < 0 ? v * a_.penalty : v / a_.penalty;
            if (a_.uniform) x_[i] = v = v / a_.temperature;
            uint64_t candidate =
                static_cast<uint64_t>(order_of(v)) << 32 | static_cast<uint32_t>(~i);
            best = candidate > best ? candidate : best;
        }
        return block_reduce<Largest, kSelectWarps>(best);
    }

    // The least key from 1 to `high` up to which weights add up to more than `most`, or `high` if
    // none of the others is; `below`: what the lesser ones add up to. A thread keeps those of its
    // scores that are between the bounds in open_, so that each pass has fewer.
    template <class By>
    MLLAMA_DEVICE uint32_t bound(uint32_t high, typename By::Weight most,
                                 typename By::Weight& below) {
        using Weight = typename By::Weight;
        const float* from = x_ + threadIdx.x;
        float* to = open_ + threadIdx.x;
        int count =
            (static_cast<int>(a_.size) - static_cast<int>(threadIdx.x) + kSelectThreads - 1) /
            kSelectThreads;
        uint32_t low = 0;
        Weight own = 0;  // of keys up to `low`
        below = 0;
        while (high - low > 1) {
            uint32_t middle = low + (high - low) / 2;
            Weight more = 0;
            int open = 0;
            for (int i = 0; i < count; ++i) {
                float x = from[int64_t{i} * kSelectThreads];
                uint32_t key = By::key(x);
                if (key <= low || key > high) continue;
                to[int64_t{open++} * kSelectThreads] = x;
                if (key <= middle) more += By::weight(x);
            }
            from = to;
            count = open;
            Weight sum = block_reduce<Sum, kSelectWarps>(own + more);
            if (sum <= most) {
                low = middle;
                own += more;
                below = sum;
            } else {
                high = middle;
            }
        }
        return high;
    }

    // The order of the top_k-th score.
    MLLAMA_DEVICE uint32_t top_k_bound() {
        int below;
        return bound<CountByScore>(~0u, static_cast<int>(a_.size - a_.top_k), below);
    }

    // Drops the unlikeliest that add up to 1 - top_p of all or less; one stays. Of equal ones the
    // first are dropped.
    MLLAMA_DEVICE void keep_top_p() {
        constexpr uint32_t kOne = 0x3f800000u;  // the bits of 1, the largest one
        double sum = 0, below;
        for_own([&](float& x) { sum += x; });
        double dropped = (1 - a_.top_p) * block_reduce<Sum, kSelectWarps>(sum);
        uint32_t least = bound<SumOfProbabilities>(kOne, dropped, below);
        double more = (dropped - below) / __uint_as_float(least);
        drop_first(least, more < 0 ? 0 : static_cast<int64_t>(more));
        for_own([&](float& x) { x = __float_as_uint(x) < least ? 0.0f : x; });
    }

    // Drops the first `count` of those with these bits; one of the largest stays. A sum over the
    // block has been taken, whose barriers are behind what others wrote to this thread's chunk.
    MLLAMA_DEVICE void drop_first(uint32_t bits, int64_t count) {
        using Counts = Array<int, kSelectThreads>;
        MLLAMA_SHARED(Counts, counts);
        int own = 0;
        for_chunk([&](float& x) { own += __float_as_uint(x) == bits; });
        counts[threadIdx.x] = own;
        __syncthreads();
        int64_t before = 0, all = 0;
        MLLAMA_UNROLL_2 for (int i = 0; i < kSelectThreads; ++i) {
            before += i < static_cast<int>(threadIdx.x) ? counts[i] : 0;
            all += counts[i];
        }
        if (bits == 0x3f800000u && count >= all) count = all - 1;
        for_chunk([&](float& x) {
            if (__float_as_uint(x) == bits && before++ < count) x = 0;
        });
        __syncthreads();
    }

    // The first one up to which probabilities add up to more than `uniform` of all; in thread 0.
    MLLAMA_DEVICE int64_t draw() const {
        using Sums = Array<double, kSelectThreads>;
        MLLAMA_SHARED(Sums, sums);
        double sum = 0;
        __syncthreads();  // others have written the chunk
        for_chunk([&](float& x) { sum += x; });
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.x != 0) return -1;
        double total = 0;
        MLLAMA_UNROLL_2 for (int i = 0; i < kSelectThreads; ++i) total += sums[i];
        double left = a_.uniform[row_] * total, in_chunk = left;
        int chunk = 0;  // the last one that has any, if rounding leaves none that ends past it
        MLLAMA_UNROLL_2 for (int i = 0; i < kSelectThreads; ++i) {
            if (sums[i] == 0) continue;
            chunk = i;
            in_chunk = left;
            if (left < sums[i]) break;
            left -= sums[i];
        }
        return draw_from(chunk * chunk_, in_chunk);
    }
    MLLAMA_DEVICE int64_t draw_from(int64_t first, double left) const {
        double added = 0;
        int64_t last = -1;
        for (int64_t i = first; i < first + chunk_ && i < a_.size; ++i) {
            if (x_[i] == 0) continue;
            last = i;
            if ((added += x_[i]) > left) break;
        }
        return last;
    }

    const kernels::SelectToken& a_;
    float *x_, *open_;
    int64_t row_, chunk_;
};

template <class T>
__global__ void __launch_bounds__(kSelectThreads)
    select_token(kernels::SelectToken a, float* scratch, int64_t rows) {
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        int64_t token = RowSelection(a, scratch + 2 * row * a.size, row).select<T>();
        if (threadIdx.x == 0) a.tokens[row] = token;
    }
}

}  // namespace mllama::cuda
