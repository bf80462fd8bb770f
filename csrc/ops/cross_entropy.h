// _cross_entropy: schema, checks and shapes, the same on every device.
#pragma once

#include "core/rows.h"
#include "kernels/cpu/cross_entropy.h"

namespace mllama {

constexpr char kCrossEntropySchema[] =
    "_cross_entropy(Tensor(a!) scores, Tensor targets, float softcap, float gradient) -> Tensor";

struct CrossEntropyArgs {
    CrossEntropyArgs(const Tensor& scores_, const Tensor& targets_, double softcap_,
                     double gradient_)
        : dtype(dtype_of(kOp, "scores", scores_)),
          scores(scores_),
          targets(targets_),
          softcap(static_cast<float>(softcap_)),
          gradient(static_cast<float>(gradient_)) {
        check(scores.dim() == 2 && scores.size(1) > 0 && scores.is_contiguous(), kOp, "scores");
        check(targets.scalar_type() == ScalarType::Long && targets.dim() == 1 &&
                  targets.size(0) == scores.size(0) && targets.is_contiguous(),
              kOp, "targets");
        losses = new_float(scores, targets.sizes());
    }
    kernels::CrossEntropy kernel() const {
        return {.dtype = dtype,
                .size = scores.size(1),
                .scores = scores.mutable_data_ptr(),
                .targets = data<int64_t>(targets),
                .softcap = softcap,
                .gradient = gradient,
                .losses = mutable_data<float>(losses)};
    }

    static constexpr const char* kOp = "_cross_entropy";
    Dtype dtype;
    Tensor scores, targets;  // [rows, vocabulary], [rows]
    float softcap, gradient;
    Tensor losses;  // [rows]
};

}  // namespace mllama
