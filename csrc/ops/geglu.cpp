#include "kernels/cpu/geglu.h"

#include "ops/gated.h"

namespace mllama {
namespace {

Tensor geglu(const Tensor& gate, const Tensor& up) {
    return gated("geglu", MLLAMA_CALL(geglu), gate, up);
}

std::tuple<Tensor, Tensor> geglu_backward(const Tensor& grad_y, const Tensor& gate,
                                          const Tensor& up) {
    return gated_backward("_geglu_backward", MLLAMA_CALL(geglu_backward), grad_y, gate, up);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    m.def("geglu(Tensor gate, Tensor up) -> Tensor");
    m.def(
        "_geglu_backward(Tensor grad_y, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor "
        "grad_up)");
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    m.impl("geglu", TORCH_BOX(&geglu));
    m.impl("_geglu_backward", TORCH_BOX(&geglu_backward));
}

}  // namespace mllama
