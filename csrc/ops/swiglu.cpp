#include "kernels/cpu/swiglu.h"

#include "ops/gated.h"

namespace mllama {
namespace {

Tensor swiglu(const Tensor& gate, const Tensor& up) {
    return gated("swiglu", MLLAMA_CALL(swiglu), gate, up);
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_y, const Tensor& gate,
                                           const Tensor& up) {
    return gated_backward("_swiglu_backward", MLLAMA_CALL(swiglu_backward), grad_y, gate, up);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
    m.def(
        "_swiglu_backward(Tensor grad_y, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor "
        "grad_up)");
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    m.impl("swiglu", TORCH_BOX(&swiglu));
    m.impl("_swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace mllama
