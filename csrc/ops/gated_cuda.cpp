#include "core/launcher.h"
#include "kernels/cuda/gated.h"
#include "ops/gated.h"

namespace mllama {
namespace {

using kernels::Activation;

template <Activation kActivation>
Tensor gated(const Tensor& gate, const Tensor& up) {
    const char* op = kActivation == Activation::silu ? "swiglu" : "geglu";
    GatedArgs a(op, gate, up);
    Launcher launcher(op, a.gate.tensor);
    launcher.reads("gate", a.gate.tensor);
    launcher.reads("up", a.up.tensor);
    launcher.writes("y", a.y);
    cuda::gated(a.kernel(kActivation), a.y.numel(), launcher.stream());
    launcher.done();
    return a.y;
}

template <Activation kActivation>
std::tuple<Tensor, Tensor> gated_backward(const Tensor& grad_y, const Tensor& gate,
                                          const Tensor& up) {
    const char* op = kActivation == Activation::silu ? "_swiglu_backward" : "_geglu_backward";
    GatedBackwardArgs a(op, grad_y, gate, up);
    Launcher launcher(op, a.gate.tensor);
    launcher.reads("grad_y", a.grad_y.tensor);
    launcher.reads("gate", a.gate.tensor);
    launcher.reads("up", a.up.tensor);
    launcher.writes("grad_gate", a.grad_gate);
    launcher.writes("grad_up", a.grad_up);
    cuda::gated_backward(a.kernel(kActivation), a.grad_up.numel(), launcher.stream());
    launcher.done();
    return {a.grad_gate, a.grad_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) {
    implement(m, "swiglu", TORCH_BOX(&gated<Activation::silu>));
    implement(m, "geglu", TORCH_BOX(&gated<Activation::gelu>));
    implement(m, "_swiglu_backward", TORCH_BOX(&gated_backward<Activation::silu>));
    implement(m, "_geglu_backward", TORCH_BOX(&gated_backward<Activation::gelu>));
}

}  // namespace mllama
