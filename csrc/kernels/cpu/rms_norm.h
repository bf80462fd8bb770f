// y = round(x / rms(x)) * weight along rows, or, with an offset, x / rms(x) * (offset + weight); an
// optional addition before it; and the gradients.
#pragma once

#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

struct RmsNorm {
    Dtype dtype;         // of x, residual, hidden, y, grads
    Dtype weight_dtype;  // f32 or dtype
    int64_t width;
    float eps;
    float offset;          // to every weight
    const void* x;         // [rows, width]
    const void* residual;  // [rows, width] or null: added to x first
    const void* weight;    // [width]
    void* hidden;          // [rows, width]: x + residual; unused without a residual
    void* y;               // [rows, width]
    float* rstd;           // [rows]: 1 / sqrt(mean(x^2) + eps)
};

struct RmsNormBackward {
    Dtype dtype;
    Dtype weight_dtype;
    int64_t width;
    float offset;
    const void* grad_y;       // [rows, width]
    const void* grad_hidden;  // [rows, width] or null: gradient of x besides the norm's
    const void* x;            // [rows, width]: what was normalized
    const void* weight;       // [width]
    const float* rstd;        // [rows]
    void* grad_x;             // [rows, width]
};

MLLAMA_KERNEL(void, rms_norm, (const RmsNorm& args, int64_t first_row, int64_t last_row))
// Adds the rows' share of the weight's gradient to grad_weight [width], unless that is null.
MLLAMA_KERNEL(void, rms_norm_backward,
              (const RmsNormBackward& args, int64_t first_row, int64_t last_row,
               float* grad_weight))

}  // namespace mllama::kernels
