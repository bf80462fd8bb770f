#include "ops/gated.h"

#include "core/threads.h"

namespace mllama {
namespace {

using kernels::Activation;

Tensor gated(const char* op, Activation activation, const Tensor& gate, const Tensor& up) {
    GatedArgs a(op, gate, up);
    kernels::Gated args = a.kernel(activation);
    auto kernel = MLLAMA_CALL(gated);
    parallel_for(gate.numel(), kGrain,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return a.y;
}

std::tuple<Tensor, Tensor> gated_backward(const char* op, Activation activation,
                                          const Tensor& grad_y, const Tensor& gate,
                                          const Tensor& up) {
    GatedBackwardArgs a(op, grad_y, gate, up);
    kernels::GatedBackward args = a.kernel(activation);
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
