#pragma once

#include "kernels/cpu/gated.h"
#include "kernels/cuda/device.cuh"

namespace mllama::cuda {

constexpr int kGatedThreads = 256;

// z(x) and its slope dz/dx, as kernels/cpu/gated.cpp has them.
struct Silu {
    static MLLAMA_DEVICE float z(float x) { return x; }
    static MLLAMA_DEVICE float slope(float) { return 1.0f; }
};
struct Gelu {
    static MLLAMA_DEVICE float z(float x) { return 1.59576912f * x * (1.0f + 0.044715f * (x * x)); }
    static MLLAMA_DEVICE float slope(float x) {
        return 1.59576912f + 3.0f * 1.59576912f * 0.044715f * (x * x);
    }
};

MLLAMA_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Calls body(row, column) for each N elements of the rows that this thread has.
template <int N, class Body>
MLLAMA_DEVICE void for_pieces(int64_t width, int64_t size, Body&& body) {
    int64_t step = int64_t{gridDim.x} * kGatedThreads * N;
    int64_t i = (int64_t{blockIdx.x} * kGatedThreads + threadIdx.x) * N;
    for (; i < size; i += step) {
        int64_t row = width == size ? 0 : i / width;  // contiguous tensors are one row
        body(row, i - row * width);
    }
}

template <class T, class Act, int N>
__global__ void __launch_bounds__(kGatedThreads) gated(kernels::Gated a, int64_t size) {
    for_pieces<N>(a.width, size, [&](int64_t row, int64_t column) {
        float x[N], up[N];
        load(x, static_cast<const T*>(a.gate) + row * a.gate_stride + column);
        load(up, static_cast<const T*>(a.up) + row * a.up_stride + column);
        MLLAMA_UNROLL for (int j = 0; j < N; ++j) x[j] = x[j] * sigmoid(Act::z(x[j])) * up[j];
        store(static_cast<T*>(a.y) + row * a.width + column, x);
    });
}

// With s = sigmoid(z): d(x s)/dx = s + x s (1 - s) dz/dx.
template <class T, class Act, int N>
__global__ void __launch_bounds__(kGatedThreads)
    gated_backward(kernels::GatedBackward a, int64_t size) {
    for_pieces<N>(a.width, size, [&](int64_t row, int64_t column) {
        float g[N], x[N], up[N];
        load(g, static_cast<const T*>(a.grad_y) + row * a.grad_stride + column);
        load(x, static_cast<const T*>(a.gate) + row * a.gate_stride + column);
        load(up, static_cast<const T*>(a.up) + row * a.up_stride + column);
        MLLAMA_UNROLL for (int j = 0; j < N; ++j) {
            float s = sigmoid(Act::z(x[j])), active = x[j] * s;
            up[j] *= g[j] * (s + active * (1.0f - s) * Act::slope(x[j]));
            g[j] *= active;
        }
        store(static_cast<T*>(a.grad_gate) + row * a.width + column, up);
        store(static_cast<T*>(a.grad_up) + row * a.width + column, g);
    });
}

}  // namespace mllama::cuda
