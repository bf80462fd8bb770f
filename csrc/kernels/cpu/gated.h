// The gated activations: y = x sigmoid(z(x)) * up with x = gate, and their gradients. SwiGLU has z
// = x; GELU's tanh form is x/2 (1 + tanh(z/2)) = x sigmoid(z) with z = 2 sqrt(2/pi) (x + 0.044715
// x^3).
#pragma once

#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

enum class Activation { silu, gelu };

// Rows of `width` elements; inputs may have gaps between rows (halves of one projection), results
// have none.
struct Gated {
    Activation activation;
    Dtype dtype;
    int64_t width;
    const void* gate;
    const void* up;
    int64_t gate_stride;  // from row to row, in elements
    int64_t up_stride;
    void* y;
    bool large;  // y is too large to stay in a cache until it is read
};

struct GatedBackward {
    Activation activation;
    Dtype dtype;
    int64_t width;
    const void* grad_y;
    const void* gate;
    const void* up;
    int64_t grad_stride;
    int64_t gate_stride;
    int64_t up_stride;
    void* grad_gate;
    void* grad_up;
    bool large;
};

// Both work on the elements [first, last), counted through the rows.
MLLAMA_KERNEL(void, gated, (const Gated& args, int64_t first, int64_t last))
MLLAMA_KERNEL(void, gated_backward, (const GatedBackward& args, int64_t first, int64_t last))

}  // namespace mllama::kernels
