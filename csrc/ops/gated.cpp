#include "ops/gated.h"

#include "core/threads.h"
#include "kernels/cpu/gated.h"

namespace mllama {
namespace {

using kernels::Activation;

// Too large to stay in a cache until the next operator reads it (measured: 17 % faster at 16 MiB,
// slower at 8).
bool is_large(const Tensor& t) {
    return t.numel() * static_cast<int64_t>(t.element_size()) >= int64_t{16} << 20;
}

Tensor gated(const char* op, Activation activation, const Tensor& gate, const Tensor& up) {
    GatedArgs a(op, gate, up);
    kernels::Gated args{.activation = activation,
                        .dtype = a.dtype,
                        .width = a.width,
                        .gate = a.gate.tensor.const_data_ptr(),
                        .up = a.up.tensor.const_data_ptr(),
                        .gate_stride = a.gate.stride,
                        .up_stride = a.up.stride,
                        .y = a.y.mutable_data_ptr(),
                        .large = is_large(a.y)};
    auto kernel = MLLAMA_CALL(gated);
    parallel_for(gate.numel(), kGrain,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return a.y;
}

std::tuple<Tensor, Tensor> gated_backward(const char* op, Activation activation,
                                          const Tensor& grad_y, const Tensor& gate,
                                          const Tensor& up) {
    GatedBackwardArgs a(op, grad_y, gate, up);
    kernels::GatedBackward args{.activation = activation,
                                .dtype = a.dtype,
                                .width = a.width,
                                .grad_y = a.grad_y.tensor.const_data_ptr(),
                                .gate = a.gate.tensor.const_data_ptr(),
                                .up = a.up.tensor.const_data_ptr(),
                                .grad_stride = a.grad_y.stride,
                                .gate_stride = a.gate.stride,
                                .up_stride = a.up.stride,
                                .grad_gate = a.grad_gate.mutable_data_ptr(),
                                .grad_up = a.grad_up.mutable_data_ptr(),
                                .large = is_large(a.grad_up)};
    auto kernel = MLLAMA_CALL(gated_backward);
    parallel_for(gate.numel(), kGrain,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return {a.grad_gate, a.grad_up};
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
    return gated("swiglu", Activation::silu, gate, up);
}
Tensor geglu(const Tensor& gate, const Tensor& up) {
    return gated("geglu", Activation::gelu, gate, up);
}
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_y, const Tensor& gate,
                                           const Tensor& up) {
    return gated_backward("_swiglu_backward", Activation::silu, grad_y, gate, up);
}
std::tuple<Tensor, Tensor> geglu_backward(const Tensor& grad_y, const Tensor& gate,
                                          const Tensor& up) {
    return gated_backward("_geglu_backward", Activation::gelu, grad_y, gate, up);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    define(m, kSwigluSchema);
    define(m, kGegluSchema);
    define(m, kSwigluBackwardSchema);
    define(m, kGegluBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "swiglu", TORCH_BOX(&swiglu));
    implement(m, "geglu", TORCH_BOX(&geglu));
    implement(m, "_swiglu_backward", TORCH_BOX(&swiglu_backward));
    implement(m, "_geglu_backward", TORCH_BOX(&geglu_backward));
}

}  // namespace mllama
