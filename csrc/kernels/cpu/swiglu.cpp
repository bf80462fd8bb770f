#include "kernels/cpu/swiglu.h"

#include "kernels/cpu/gated_loops.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

struct Silu {
    static vf z(vf x) { return x; }
    static float slope(vf) { return 1.0f; }
};

}  // namespace

void swiglu(const Gated& args, int64_t first, int64_t last) {
    gated_forward<Silu>(args, first, last);
}
void swiglu_backward(const GatedBackward& args, int64_t first, int64_t last) {
    gated_backward<Silu>(args, first, last);
}

}  // namespace mllama::kernels::MLLAMA_ISA
