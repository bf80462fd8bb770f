#include "core/launcher.h"
#include "kernels/cuda/select_token.h"
#include "ops/select_token.h"

namespace mllama {
namespace {

// Rows whose scores are no distribution get the token -1: an error would have to wait for the
// device.
Tensor select_token(const Tensor& logits, const MaybeTensor& uniform, const MaybeTensor& present,
                    double temperature, int64_t top_k, double top_p, double min_p,
                    double repetition_penalty) {
    const char* op = "select_token";
    SelectTokenArgs a(op, logits, uniform, present);
    check(top_k >= 0, op, "top_k");
    int64_t rows = a.logits.size(0);
    Tensor scratch = new_float(a.logits, {uniform ? rows : 0, 2, a.logits.size(1)});
    Launcher launcher(op, a.logits);
    launcher.reads("logits", a.logits);
    if (a.uniform) launcher.reads("uniform", *a.uniform);
    if (a.present) launcher.reads("present", *a.present);
    launcher.scratch("scratch", scratch);
    launcher.writes("tokens", a.tokens);
    cuda::select_token(a.kernel(temperature, top_k, top_p, min_p, repetition_penalty),
                       mutable_data<float>(scratch), rows, launcher.stream());
    launcher.done();
    return a.tokens;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) {
    implement(m, "select_token", TORCH_BOX(&select_token));
}

}  // namespace mllama
