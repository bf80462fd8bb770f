// Which keys are visible to a query, from masks in the device's memory.
#pragma once

#include <limits>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/device.cuh"

namespace mllama::cuda {

using kernels::KeyRange;

constexpr float kLog2e = 1.44269504f;

template <class T>
MLLAMA_DEVICE T smaller(T a, T b) {
    return a < b ? a : b;
}
template <class T>
MLLAMA_DEVICE T larger(T a, T b) {
    return a > b ? a : b;
}
MLLAMA_DEVICE int64_t clamped(int64_t value, int64_t least, int64_t most) {
    return smaller(larger(value, least), most);
}

// The keys visible to query t of batch row b, without those that `added_score` hides. An empty
// range is {keys, 0}.
MLLAMA_DEVICE KeyRange visible_keys(const Attention& a, int64_t b, int t) {
    constexpr int64_t kFar = int64_t{1} << 62;  // beyond it nothing changes, and sums fit
    const Masks& m = a.masks;
    int64_t first = 0, last = a.keys;
    if (m.causal) {
        int64_t given = m.query_offset.data ? m.query_offset.data[b * m.query_offset.stride]
                                            : int64_t{a.keys} - a.queries,
                position = t + clamped(given, -int64_t{a.queries}, kFar);
        last = position + 1;
        if (m.window) first = t + clamped(larger(given, -kFar) - m.window + 1, -a.queries, a.keys);
        if (m.prefix_length.data) {
            int64_t prefix =
                m.prefix_length.data[b * m.prefix_length.stride + (m.prefix_per_query ? t : 0)];
            if (position < prefix) first = 0, last = prefix;
        }
    }
    if (m.first_key.data) {
        int64_t query = m.first_key_per_query ? t : 0;
        first = larger(first, m.first_key.data[b * m.first_key.stride + query]);
    }
    first = larger<int64_t>(first, 0);
    last = smaller<int64_t>(last, a.keys);
    if (first >= last) return {a.keys, 0};
    return {static_cast<int32_t>(first), static_cast<int32_t>(last)};
}

MLLAMA_DEVICE bool adds_to_scores(const Attention& a) {
    return a.masks.key_mask.data || a.masks.key_bias.data;
}

// What is added to a key's scores, in log2 units; -inf hides it. Finite biases stay finite,
// although the largest are out of range. NaN hides, as -inf does.
MLLAMA_DEVICE float added_score(const Attention& a, int64_t b, int key) {
    const Masks& m = a.masks;
    if (m.key_mask.data && !m.key_mask.data[b * m.key_mask.stride + key]) return -kInfinity;
    if (!m.key_bias.data) return 0;
    float bias = m.key_bias.data[b * m.key_bias.stride + key];
    if (!(bias > -kInfinity)) return -kInfinity;
    return bias > kLargest ? bias : smaller(larger(bias * kLog2e, -kLargest), kLargest);
}

// The smallest range that has those of all threads of the block, with the empty one {keys, 0}.
template <int kWarps>
MLLAMA_DEVICE KeyRange block_union(KeyRange range) {
    using Parts = Array<KeyRange, kWarps>;
    MLLAMA_SHARED(Parts, parts);
    MLLAMA_UNROLL for (int step = 16; step; step /= 2) {
        range.first = smaller(range.first, __shfl_xor_sync(kAllLanes, range.first, step));
        range.last = larger(range.last, __shfl_xor_sync(kAllLanes, range.last, step));
    }
    __syncthreads();  // the last use of parts is over
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = range;
    __syncthreads();
    range = parts[0];
    MLLAMA_UNROLL for (int i = 1; i < kWarps; ++i) {
        range.first = smaller(range.first, parts[i].first);
        range.last = larger(range.last, parts[i].last);
    }
    return range;
}

// The keys that any thread's queries see: those of `mine`, as far as something but -inf is added.
template <int kWarps>
MLLAMA_DEVICE KeyRange keys_of_block(const Attention& a, int64_t b, KeyRange mine) {
    KeyRange range = block_union<kWarps>(mine);
    if (!adds_to_scores(a)) return range;
    mine = {a.keys, 0};
    for (int key = range.first + threadIdx.x; key < range.last; key += 32 * kWarps) {
        if (added_score(a, b, key) == -kInfinity) continue;
        mine = {smaller(mine.first, key), key + 1};
    }
    return block_union<kWarps>(mine);
}

// Turns products of q and k into scores in log2 units: factor * product, or with a soft cap factor
// * tanh(inner * product).
struct ScoreScale {
    bool capped;
    float inner, factor;

    MLLAMA_DEVICE explicit ScoreScale(const Attention& a)
        : capped(a.softcap > 0),
          inner(capped ? a.scale / a.softcap : 1),
          factor((capped ? a.softcap : a.scale) * kLog2e) {}
    // To be multiplied with factor.
    MLLAMA_DEVICE float cap(float product) const {
        return capped ? tanhf(inner * product) : product;
    }
};

}  // namespace mllama::cuda
