#pragma once

#include "kernels/cpu/cross_entropy.h"
#include "kernels/cuda/rows.cuh"

namespace mllama::cuda {

template <class T, int kWarps, int N>
__global__ void __launch_bounds__(kRowBlockThreads)
    cross_entropy(kernels::CrossEntropy a, int64_t rows) {
    RowTeam<kWarps> team;
    float inverse = a.softcap == 0 ? 0.0f : 1.0f / a.softcap;
    auto bent = [&](float x) { return a.softcap == 0 ? x : a.softcap * tanhf(x * inverse); };
    for (int64_t row = team.first_row(); row < rows; row += team.row_step()) {
        T* scores = static_cast<T*>(a.scores) + row * a.size;
        int64_t target = a.targets[row];
        bool counts = 0 <= target && target < a.size;
        float v[N], top = -kInfinity, sum = 0, own = 0;
        team.template for_elements<N>(a.size, [&](int64_t i) {
            load(v, scores + i);
            MLLAMA_UNROLL for (int j = 0; j < N; ++j) top = fmaxf(top, v[j]);
        });
        top = bent(team.max(top));  // bending keeps the order
        team.template for_elements<N>(a.size, [&](int64_t i) {
            load(v, scores + i);
            MLLAMA_UNROLL for (int j = 0; j < N; ++j) {
                float x = bent(v[j]);
                sum += expf(x - top);
                if (i + j == target) own = x;
            }
        });
        sum = team.sum(sum);
        own = team.sum(own);  // one thread has it
        if (threadIdx.x % team.kThreads == 0) a.losses[row] = counts ? logf(sum) - (own - top) : 0;
        if (a.gradient == 0) continue;
        float share = a.gradient / sum;
        team.template for_elements<N>(a.size, [&](int64_t i) {
            load(v, scores + i);
            MLLAMA_UNROLL for (int j = 0; j < N; ++j) {
                float x = v[j];
                v[j] = share * expf(bent(x) - top);
                if (counts && i + j == target) v[j] -= a.gradient;
                if (!counts) v[j] = 0;
                if (a.softcap != 0) {  // d/dx softcap tanh(x / softcap) = 1 - tanh^2
                    float t = tanhf(x * inverse);
                    v[j] *= 1.0f - t * t;
                }
            }
            store(scores + i, v);
        });
    }
}

}  // namespace mllama::cuda
