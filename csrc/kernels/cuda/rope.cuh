#pragma once

#include "kernels/cpu/rope.h"
#include "kernels/cuda/device.cuh"

namespace mllama::cuda {

constexpr int kRopeThreads = 256;

// A thread has N elements of the first half of a head, and those across from them.
template <class T, int N>
__global__ void __launch_bounds__(kRopeThreads) rope(kernels::Rope a, int64_t all_tokens) {
    int64_t per_head = a.half / N, per_token = (a.q.heads + a.k.heads) * per_head,
            pieces = all_tokens * per_token, step = int64_t{gridDim.x} * kRopeThreads;
    int64_t piece = int64_t{blockIdx.x} * kRopeThreads + threadIdx.x;
    for (; piece < pieces; piece += step) {
        int64_t row = piece / per_token, in_token = piece - row * per_token;
        int64_t head = in_token / per_head, i = (in_token - head * per_head) * N;
        int64_t batch = row / a.tokens, token = row - batch * a.tokens;
        bool is_key = head >= a.q.heads;
        if (is_key) head -= a.q.heads;
        const kernels::RopeHeads& h = is_key ? a.k : a.q;
        const T* from = static_cast<const T*>(h.x) + batch * h.batch_stride +
                        token * h.token_stride + head * h.head_stride + i;
        T* to = static_cast<T*>(h.y) + (row * h.heads + head) * 2 * a.half + i;
        float c[N], s[N], x1[N], x2[N], y1[N], y2[N];
        load(c, a.cos + batch * a.cos_batch_stride + token * a.half + i);
        load(s, a.sin + batch * a.sin_batch_stride + token * a.half + i);
        load(x1, from);
        load(x2, from + a.half);
        MLLAMA_UNROLL for (int j = 0; j < N; ++j) {
            float sine = s[j] * a.sign;
            y1[j] = x1[j] * c[j] - x2[j] * sine;
            y2[j] = x2[j] * c[j] + x1[j] * sine;
        }
        store(to, y1);
        store(to + a.half, y2);
    }
}

}  // namespace mllama::cuda
