// From the sums of a product to its results.
#pragma once

#include "kernels/cpu/packed_linear.h"
#include "simd/math.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

inline vf activate(LinearActivation activation, vf x) {
    switch (activation) {
        case LinearActivation::none: return x;
        case LinearActivation::gelu: return gelu(x);
        case LinearActivation::gelu_tanh: return x * sigmoid(gelu_argument(x));
        case LinearActivation::quick_gelu: return x * sigmoid(1.702f * x);
    }
    __builtin_unreachable();
}

// n results of the columns from `column` on.
inline vf finish(const PackedLinear& a, int64_t column, int n, vf sum) {
    return activate(a.activation, a.bias ? sum + at(a.bias + column, n) : sum);
}

}  // namespace
}  // namespace mllama::kernels::MLLAMA_ISA
