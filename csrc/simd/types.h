// The element types kernels read and write. The half-width floats are plain bits: no arithmetic is
// done on them, vectors are widened to f32 first.
#pragma once

#include <cstdint>

namespace mllama {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

enum class Dtype { f32, bf16, f16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }  // bytes

// Calls body(T{}) with T = float, bf16 or f16, as `dtype` says.
template <class Body>
inline void dispatch(Dtype dtype, Body&& body) {
    switch (dtype) {
        case Dtype::f32: return body(float{});
        case Dtype::bf16: return body(bf16{});
        case Dtype::f16: return body(f16{});
    }
}

// The same for two types, where parameters are f32 or of the activations' dtype: body(T{}, W{}).
template <class Body>
inline void dispatch(Dtype dtype, Dtype weight_dtype, Body&& body) {
    dispatch(dtype, [&](auto t) {
        if (weight_dtype == Dtype::f32) {
            body(t, float{});
        } else {
            body(t, t);
        }
    });
}

}  // namespace mllama
