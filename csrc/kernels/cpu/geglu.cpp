#include "kernels/cpu/geglu.h"

#include "kernels/cpu/gated_loops.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

struct Gelu {
    static constexpr float kScale = 1.59576912f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
    static vf z(vf x) { return kScale * x * (1.0f + kCubic * (x * x)); }
    static vf slope(vf x) { return kScale + 3.0f * kScale * kCubic * (x * x); }
};

}  // namespace

void geglu(const Gated& args, int64_t first, int64_t last) {
    gated_forward<Gelu>(args, first, last);
}
void geglu_backward(const GatedBackward& args, int64_t first, int64_t last) {
    gated_backward<Gelu>(args, first, last);
}

}  // namespace mllama::kernels::MLLAMA_ISA
