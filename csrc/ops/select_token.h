// select_token: schema, checks and shapes, the same on every device.
#pragma once

#include "core/rows.h"
#include "kernels/cpu/select_token.h"

namespace mllama {

constexpr char kSelectTokenSchema[] =
    "select_token(Tensor logits, Tensor? uniform, Tensor? present, float temperature, int top_k, "
    "float top_p, float min_p, float repetition_penalty) -> Tensor";

struct SelectTokenArgs {
    SelectTokenArgs(const char* op, const Tensor& logits_, const MaybeTensor& uniform_,
                    const MaybeTensor& present_)
        : dtype(dtype_of(op, "logits", logits_)) {
        check(logits_.dim() == 2 && logits_.size(1) > 0 && logits_.size(1) < INT32_MAX, op,
              "logits");
        logits = dense(logits_);
        if (uniform_) {
            check(uniform_->scalar_type() == ScalarType::Double && uniform_->dim() == 1 &&
                      uniform_->size(0) == logits.size(0),
                  op, "uniform");
            uniform = dense(*uniform_);
        }
        if (present_) {
            check(present_->scalar_type() == ScalarType::Bool && present_->dim() == 2 &&
                      present_->sizes() == logits.sizes(),
                  op, "present");
            present = dense(*present_);
        }
        tokens = new_tensor(logits, {logits.size(0)}, aoti_torch_dtype_int64());
    }
    kernels::SelectToken kernel(double temperature, int64_t top_k, double top_p, double min_p,
                                double repetition_penalty) const {
        return {.dtype = dtype,
                .size = logits.size(1),
                .logits = logits.const_data_ptr(),
                .present = present ? data<bool>(*present) : nullptr,
                .uniform = uniform ? data<double>(*uniform) : nullptr,
                .penalty = static_cast<float>(repetition_penalty),
                .temperature = static_cast<float>(temperature),
                .top_k = top_k,
                .top_p = top_p,
                .min_p = static_cast<float>(min_p),
                .tokens = mutable_data<int64_t>(tokens)};
    }

    Dtype dtype;
    Tensor logits;        // [rows, vocabulary]
    MaybeTensor uniform;  // float64 [rows]
    MaybeTensor present;  // bool [rows, vocabulary]
    Tensor tokens;        // int64 [rows]
};

}  // namespace mllama
