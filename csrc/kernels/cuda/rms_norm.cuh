#pragma once

#include "kernels/cpu/rms_norm.h"
#include "kernels/cuda/rows.cuh"

namespace mllama::cuda {

template <class T, class W, int kWarps, int N>
__global__ void __launch_bounds__(kRowBlockThreads) rms_norm(kernels::RmsNorm a, int64_t rows) {
    RowTeam<kWarps> team;
    const W* weight = static_cast<const W*>(a.weight);
    for (int64_t row = team.first_row(); row < rows; row += team.row_step()) {
        const T* x = static_cast<const T*>(a.x) + row * a.width;
        const T* residual = static_cast<const T*>(a.residual) + row * a.width;
        T* hidden = static_cast<T*>(a.hidden) + row * a.width;
        T* y = static_cast<T*>(a.y) + row * a.width;
        float squares = 0, v[N], w[N];
        team.template for_elements<N>(a.width, [&](int64_t i) {
            load(v, x + i);
            if (a.residual) {
                load(w, residual + i);
                MLLAMA_UNROLL for (int j = 0; j < N; ++j) v[j] = rounded<T>(v[j] + w[j]);
                store(hidden + i, v);
            }
            MLLAMA_UNROLL for (int j = 0; j < N; ++j) squares += v[j] * v[j];
        });
        float rstd = 1.0f / sqrtf(team.sum(squares) / static_cast<float>(a.width) + a.eps);
        if (threadIdx.x % team.kThreads == 0) a.rstd[row] = rstd;
        if (a.residual) x = hidden;  // each thread reads what it wrote
        team.template for_elements<N>(a.width, [&](int64_t i) {
            load(v, x + i);
            load(w, weight + i);
            MLLAMA_UNROLL for (int j = 0; j < N; ++j) {
                // Llama's order and Gemma's, as kernels/cpu/rms_norm.cpp has them
                v[j] = a.offset == 0 ? rounded<T>(v[j] * rstd) * w[j]
                                     : v[j] * rstd * (w[j] + a.offset);
            }
            store(y + i, v);
        });
    }
}

// With n = x * rstd and w = weight + offset: grad_x = rstd * (g w - n * mean(g w n)).
template <class T, class W, int kWarps, int N>
__global__ void __launch_bounds__(kRowBlockThreads)
    rms_norm_backward(kernels::RmsNormBackward a, int64_t rows) {
    RowTeam<kWarps> team;
    const W* weight = static_cast<const W*>(a.weight);
    for (int64_t row = team.first_row(); row < rows; row += team.row_step()) {
        const T* g = static_cast<const T*>(a.grad_y) + row * a.width;
        const T* x = static_cast<const T*>(a.x) + row * a.width;
        const T* beside = static_cast<const T*>(a.grad_hidden) + row * a.width;
        T* grad_x = static_cast<T*>(a.grad_x) + row * a.width;
        float rstd = a.rstd[row], dots = 0, u[N], v[N], w[N];
        team.template for_elements<N>(a.width, [&](int64_t i) {
            load(u, g + i);
            load(v, x + i);
            load(w, weight + i);
            MLLAMA_UNROLL for (int j = 0; j < N; ++j) dots += u[j] * (w[j] + a.offset) * v[j];
        });
        float share = team.sum(dots) / static_cast<float>(a.width) * rstd * rstd * rstd;
        team.template for_elements<N>(a.width, [&](int64_t i) {
            load(u, g + i);
            load(v, x + i);
            load(w, weight + i);
            MLLAMA_UNROLL for (int j = 0; j < N; ++j) {
                v[j] = u[j] * (w[j] + a.offset) * rstd - v[j] * share;
            }
            if (a.grad_hidden) {
                load(u, beside + i);
                MLLAMA_UNROLL for (int j = 0; j < N; ++j) v[j] += u[j];
            }
            store(grad_x + i, v);
        });
    }
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads)
    rms_norm_weight_gradient(kernels::RmsNormBackward a, float* parts, int64_t rows) {
    const T* g = static_cast<const T*>(a.grad_y);
    const T* x = static_cast<const T*>(a.x);
    sum_part<1>(parts, rows, a.width, [&](int64_t row, int64_t column, float (&sum)[1]) {
        int64_t i = row * a.width + column;
        sum[0] += to_float(g[i]) * (to_float(x[i]) * a.rstd[row]);
    });
}

}  // namespace mllama::cuda
