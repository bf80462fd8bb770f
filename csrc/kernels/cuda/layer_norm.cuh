#pragma once

#include "kernels/cpu/layer_norm.h"
#include "kernels/cuda/rows.cuh"

namespace mllama::cuda {

template <class T, class W, int kWarps, int N>
__global__ void __launch_bounds__(kRowBlockThreads) layer_norm(kernels::LayerNorm a, int64_t rows) {
    RowTeam<kWarps> team;
    const W* weight = static_cast<const W*>(a.weight);
    const W* bias = static_cast<const W*>(a.bias);
    float width = static_cast<float>(a.width);
    for (int64_t row = team.first_row(); row < rows; row += team.row_step()) {
        const T* x = static_cast<const T*>(a.x) + row * a.width;
        T* y = static_cast<T*>(a.y) + row * a.width;
        float sum = 0, squares = 0, v[N], w[N], b[N];
        team.template for_elements<N>(a.width, [&](int64_t i) {
            load(v, x + i);
            MLLAMA_UNROLL for (int j = 0; j < N; ++j) sum += v[j];
        });
        float mean = team.sum(sum) / width;
        // The variance about the mean: the mean of squares less the squared mean would cancel.
        team.template for_elements<N>(a.width, [&](int64_t i) {
            load(v, x + i);
            MLLAMA_UNROLL for (int j = 0; j < N; ++j) squares += (v[j] - mean) * (v[j] - mean);
        });
        float rstd = 1.0f / sqrtf(team.sum(squares) / width + a.eps);
        if (threadIdx.x % team.kThreads == 0) {
            a.statistics[2 * row] = mean;
            a.statistics[2 * row + 1] = rstd;
        }
        team.template for_elements<N>(a.width, [&](int64_t i) {
            load(v, x + i);
            load(w, weight + i);
            load(b, bias + i);
            MLLAMA_UNROLL for (int j = 0; j < N; ++j) v[j] = (v[j] - mean) * rstd * w[j] + b[j];
            store(y + i, v);
        });
    }
}

// With n = (x - mean) rstd: grad_x = rstd (g w - mean(g w) - n mean(g w n)).
template <class T, class W, int kWarps, int N>
__global__ void __launch_bounds__(kRowBlockThreads)
    layer_norm_backward(kernels::LayerNormBackward a, int64_t rows) {
    RowTeam<kWarps> team;
    const W* weight = static_cast<const W*>(a.weight);
    float width = static_cast<float>(a.width);
    for (int64_t row = team.first_row(); row < rows; row += team.row_step()) {
        const T* g = static_cast<const T*>(a.grad_y) + row * a.width;
        const T* x = static_cast<const T*>(a.x) + row * a.width;
        T* grad_x = static_cast<T*>(a.grad_x) + row * a.width;
        float mean = a.statistics[2 * row], rstd = a.statistics[2 * row + 1];
        float sums = 0, dots = 0, u[N], v[N], w[N];
        team.template for_elements<N>(a.width, [&](int64_t i) {
            load(u, g + i);
            load(v, x + i);
            load(w, weight + i);
            MLLAMA_UNROLL for (int j = 0; j < N; ++j) {
                sums += u[j] * w[j];
                dots += u[j] * w[j] * ((v[j] - mean) * rstd);
            }
        });
        float sum = team.sum(sums) / width * rstd, share = team.sum(dots) / width * rstd * rstd;
        team.template for_elements<N>(a.width, [&](int64_t i) {
            load(u, g + i);
            load(v, x + i);
            load(w, weight + i);
            MLLAMA_UNROLL for (int j = 0; j < N; ++j) {
                v[j] = u[j] * w[j] * rstd - (v[j] - mean) * share - sum;
            }
            store(grad_x + i, v);
        });
    }
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads)
    layer_norm_parameter_gradients(kernels::LayerNormBackward a, float* parts, int64_t rows) {
    const T* g = static_cast<const T*>(a.grad_y);
    const T* x = static_cast<const T*>(a.x);
    sum_part<2>(parts, rows, a.width, [&](int64_t row, int64_t column, float (&sums)[2]) {
        int64_t i = row * a.width + column;
        float gradient = to_float(g[i]);
        sums[0] +=
            gradient * ((to_float(x[i]) - a.statistics[2 * row]) * a.statistics[2 * row + 1]);
        sums[1] += gradient;
    });
}

}  // namespace mllama::cuda
