// y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias along rows; and its gradients.
#pragma once

#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

struct LayerNorm {
    Dtype dtype;         // of x, y, grads
    Dtype weight_dtype;  // of weight and bias: f32 or dtype
    int64_t width;
    float eps;
    const void* x;       // [rows, width]
    const void* weight;  // [width]
    const void* bias;    // [width]
    void* y;             // [rows, width]
    float* statistics;   // [rows, 2]: mean and 1 / sqrt(variance + eps)
};

struct LayerNormBackward {
    Dtype dtype;
    Dtype weight_dtype;
    int64_t width;
    const void* grad_y;       // [rows, width]
    const void* x;            // [rows, width]
    const void* weight;       // [width]
    const float* statistics;  // [rows, 2]
    void* grad_x;             // [rows, width]
};

MLLAMA_KERNEL(void, layer_norm, (const LayerNorm& args, int64_t first_row, int64_t last_row))
// Adds the rows' share of the gradients of weight and bias to grad_weight and grad_bias [width],
// unless those are null.
MLLAMA_KERNEL(void, layer_norm_backward,
              (const LayerNormBackward& args, int64_t first_row, int64_t last_row,
               float* grad_weight, float* grad_bias))

}  // namespace mllama::kernels
