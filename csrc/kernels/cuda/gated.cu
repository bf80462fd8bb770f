#include "kernels/cuda/gated.cuh"

#include "kernels/cuda/gated.h"

namespace mllama::cuda {
namespace {

// Calls run(T{}, Silu{} or Gelu{}).
template <class Args, class Run>
void choose(const Args& a, Run&& run) {
    dispatch(a.dtype, [&](auto t) {
        if (a.activation == kernels::Activation::silu) {
            run(t, Silu{});
        } else {
            run(t, Gelu{});
        }
    });
}

template <class... Strides>
bool are_multiples(int vector, Strides... strides) {
    return ((strides % vector == 0) && ...);
}

}  // namespace

void gated(const kernels::Gated& a, int64_t size, Stream stream) {
    choose(a, [&](auto t, auto activation) {
        using T = decltype(t);
        using Act = decltype(activation);
        constexpr int N = kVector<T>;
        bool vectors =
            are_aligned(a.gate, a.up, a.y) && are_multiples(N, a.width, a.gate_stride, a.up_stride);
        launch("gated", vectors ? &gated<T, Act, N> : &gated<T, Act, 1>,
               blocks_for(size, kGatedThreads * (vectors ? N : 1)), kGatedThreads, 0, stream, a,
               size);
    });
}

void gated_backward(const kernels::GatedBackward& a, int64_t size, Stream stream) {
    choose(a, [&](auto t, auto activation) {
        using T = decltype(t);
        using Act = decltype(activation);
        constexpr int N = kVector<T>;
        bool vectors = are_aligned(a.grad_y, a.gate, a.up, a.grad_gate, a.grad_up) &&
                       are_multiples(N, a.width, a.grad_stride, a.gate_stride, a.up_stride);
        launch("gated_backward", vectors ? &gated_backward<T, Act, N> : &gated_backward<T, Act, 1>,
               blocks_for(size, kGatedThreads * (vectors ? N : 1)), kGatedThreads, 0, stream, a,
               size);
    });
}

}  // namespace mllama::cuda
