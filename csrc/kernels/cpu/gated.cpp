#include "kernels/cpu/gated.h"

#include "simd/math.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

// z(x) and its slope dz/dx.
struct Silu {
    static vf z(vf x) { return x; }
    static float slope(vf) { return 1.0f; }
};
struct Gelu {
    static vf z(vf x) { return gelu_argument(x); }
    static vf slope(vf x) { return kGeluScale + 3.0f * kGeluScale * kGeluCubic * (x * x); }
};

// Calls body(Silu{} or Gelu{}, T{}) as the arguments say.
template <class Args, class Body>
void dispatch_gated(const Args& a, Body&& body) {
    dispatch(a.dtype, [&](auto t) {
        if (a.activation == Activation::silu) {
            body(Silu{}, t);
        } else {
            body(Gelu{}, t);
        }
    });
}

// As accurate as the element type asks for.
template <class T>
vf sigmoid_for(vf x) {
    return sizeof(T) == 2 ? sigmoid_16bit(x) : sigmoid(x);
}

// Calls body(row, column, count) for the pieces of rows that make up the elements [first, last).
template <class Body>
void for_pieces(int64_t width, int64_t first, int64_t last, Body&& body) {
    while (first < last) {
        int64_t row = first / width, column = first % width;
        int64_t count = width - column < last - first ? width - column : last - first;
        body(row, column, count);
        first += count;
    }
}

template <bool kStream, class T>
void write(T* p, vf x, int n) {
    if (kStream && n == kWidth) {
        stream(p, x);
    } else {
        put(p, x, n);
    }
}

template <class Act, bool kStream, class T>
void gated_piece(const T* gate, const T* up, T* y, int64_t count) {
    for_vectors(count, [&](int64_t i, int n) {
        vf x = at(gate + i, n);
        write<kStream>(y + i, x * sigmoid_for<T>(Act::z(x)) * at(up + i, n), n);
    });
}

// With s = sigmoid(z): d(x s)/dx = s + x s (1 - s) dz/dx.
template <class Act, bool kStream, class T>
void gated_backward_piece(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up,
                          int64_t count) {
    for_vectors(count, [&](int64_t i, int n) {
        vf g = at(grad + i, n), x = at(gate + i, n), s = sigmoid_for<T>(Act::z(x)), active = x * s;
        write<kStream>(grad_gate + i, g * at(up + i, n) * (s + active * (1.0f - s) * Act::slope(x)),
                       n);
        write<kStream>(grad_up + i, g * active, n);
    });
}

}  // namespace

void gated(const Gated& a, int64_t first, int64_t last) {
    dispatch_gated(a, [&](auto activation, auto t) {
        using Act = decltype(activation);
        using T = decltype(t);
        for_pieces(a.width, first, last, [&](int64_t row, int64_t column, int64_t count) {
            const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + column;
            const T* up = static_cast<const T*>(a.up) + row * a.up_stride + column;
            T* y = static_cast<T*>(a.y) + row * a.width + column;
            bool streams = a.large && can_stream(y);
            (streams ? gated_piece<Act, true, T> : gated_piece<Act, false, T>)(gate, up, y, count);
        });
    });
    streams_done();
}

void gated_backward(const GatedBackward& a, int64_t first, int64_t last) {
    dispatch_gated(a, [&](auto activation, auto t) {
        using Act = decltype(activation);
        using T = decltype(t);
        for_pieces(a.width, first, last, [&](int64_t row, int64_t column, int64_t count) {
            const T* grad = static_cast<const T*>(a.grad_y) + row * a.grad_stride + column;
            const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + column;
            const T* up = static_cast<const T*>(a.up) + row * a.up_stride + column;
            T* grad_gate = static_cast<T*>(a.grad_gate) + row * a.width + column;
            T* grad_up = static_cast<T*>(a.grad_up) + row * a.width + column;
            bool streams = a.large && can_stream(grad_gate) && can_stream(grad_up);
            (streams
                 ? gated_backward_piece<Act, true, T>
                 : gated_backward_piece<Act, false, T>)(grad, gate, up, grad_gate, grad_up, count);
        });
    });
    streams_done();
}

}  // namespace mllama::kernels::MLLAMA_ISA
