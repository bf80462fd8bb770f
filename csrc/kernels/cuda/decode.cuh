#pragma once

#include "kernels/cuda/decode.h"
#include "kernels/cuda/quantized_rows.cuh"

namespace mllama::cuda {

constexpr int kStepThreads = 256;

// cos and sin of a multiple of the circle: reduced in float64, since angles have as many digits
// before the point as positions.
MLLAMA_DEVICE void turn(float angle, float& cosine, float& sine) {
    double turns = static_cast<double>(angle) * 0.15915494309189535;
    float halves = static_cast<float>(2 * (turns - rint(turns)));
    cosine = cospif(halves);
    sine = sinpif(halves);
}

template <int = 0>
__global__ void __launch_bounds__(kStepThreads)
    start_step(StepStart s, const float* frequencies, float* cos, float* sin) {
    int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x, step = gridDim.x * kStepThreads,
            length = *s.length;
    if (i == 0 && !(0 <= length && length <= s.capacity - s.queries))
        trap("decode_step: length: the caches have no room for it");
    if (s.first_key) {
        for (int64_t row = i; row < s.batch; row += step) {
            if (!(0 <= s.first_key[row] && s.first_key[row] <= length))
                trap("decode_step: first_key is not in 0 to length");
        }
    }
    for (; i < s.batch * s.queries * s.half; i += step) {
        turn(static_cast<float>(s.positions[i / s.half]) * frequencies[i % s.half], cos[i], sin[i]);
    }
}

// ---- heads

constexpr int kHeadWarps = 4, kMostHeadSize = 256;

// What a warp has: head `index` of q, k or v in a row.
struct HeadPlace {
    enum Kind { query, key, value } kind;
    int64_t row;
    int index;
    MLLAMA_DEVICE HeadPlace(const NewHeads& a, int64_t i) {
        int per_row = a.heads + 2 * a.kv_heads, head = static_cast<int>(i % per_row);
        row = i / per_row;
        kind = head < a.heads ? query : head < a.heads + a.kv_heads ? key : value;
        index = kind == query ? head : (head - a.heads) % a.kv_heads;
    }
};

// A warp loads a head, normalized if it has a norm, to x.
MLLAMA_DEVICE void load_head(const NewHeads& a, const HeadPlace& place, float* x) {
    const int lane = threadIdx.x % 32,
              heads = place.kind == HeadPlace::query ? a.heads : a.kv_heads;
    const float* from = place.kind == HeadPlace::query ? a.q
                        : place.kind == HeadPlace::key ? a.k
                                                       : a.v;
    const float* norm = place.kind == HeadPlace::query ? a.q_norm
                        : place.kind == HeadPlace::key ? a.k_norm
                                                       : nullptr;
    from += (place.row * heads + place.index) * a.size;
    float squares = 0;
    for (int d = lane; d < a.size; d += 32) {
        x[d] = from[d];
        squares += x[d] * x[d];
    }
    if (!norm) return;
    float rstd = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(a.size) + a.eps);
    for (int d = lane; d < a.size; d += 32) {
        // As rms_norm has them.
        x[d] = a.norm_offset == 0 ? x[d] * rstd * norm[d] : x[d] * rstd * (norm[d] + a.norm_offset);
    }
}

// Element d of a head x that is rotated as its row's position says.
MLLAMA_DEVICE float rotated(const NewHeads& a, int64_t row, const float* x, int d) {
    const int half = a.size / 2, i = d < half ? d : d - half;
    const float c = a.cos[row * half + i], s = a.sin[row * half + i];
    return d < half ? x[d] * c - x[d + half] * s : x[d] * c + x[d - half] * s;
}

// T: of queries. C: of the cache, int8_t if it is quantized.
template <class T, class C>
__global__ void __launch_bounds__(32 * kHeadWarps) place_heads(NewHeads a) {
    constexpr bool kQuantized = std::is_same_v<C, int8_t>;
    using Heads = Array<float, kHeadWarps * kMostHeadSize>;
    MLLAMA_SHARED(Heads, heads);
    float* x = &heads[static_cast<int>(threadIdx.x) / 32 * kMostHeadSize];
    const int64_t all = a.rows * (a.heads + 2 * a.kv_heads);
    int64_t i = int64_t{blockIdx.x} * kHeadWarps + threadIdx.x / 32;
    for (; i < all; i += int64_t{gridDim.x} * kHeadWarps) {
        const HeadPlace place(a, i);
        const bool is_query = place.kind == HeadPlace::query,
                   rotates = a.kv_heads > 0 && place.kind != HeadPlace::value;
        load_head(a, place, x);
        __syncwarp();
        T* query = static_cast<T*>(a.query) + (place.row * a.heads + place.index) * a.size;
        C* cached = nullptr;
        if (!is_query) {
            int64_t head = place.row / a.queries * a.kv_heads + place.index,
                    position = *a.length + place.row % a.queries;
            void* cache = place.kind == HeadPlace::key ? a.keys : a.values;
            cached = static_cast<C*>(cache) + (head * a.capacity + position) * a.row;
        }
        for (int first = 0; first < a.size; first += 32) {
            const int d = first + static_cast<int>(threadIdx.x) % 32;
            float v = 0;
            if (d < a.size) v = rotates ? rotated(a, place.row, x, d) : x[d];
            if (is_query) {
                if (d < a.size) query[d] = from_float<T>(v);
            } else if constexpr (kQuantized) {
                store_group(cached, a.size, first / 32, v);
            } else {
                if (d < a.size) cached[d] = from_float<C>(v);
            }
        }
        __syncwarp();
    }
}

template <int = 0>
__global__ void __launch_bounds__(kStepThreads)
    scale_rows(float* x, int64_t rows, int64_t width, float factor, const bool* sees_image) {
    int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x;
    for (; i < rows * width; i += int64_t{gridDim.x} * kStepThreads) {
        x[i] = sees_image && !sees_image[i / width] ? 0 : x[i] * factor;
    }
}

}  // namespace mllama::cuda
