// patch_embed: schemas, checks and sizes, shared by all devices.
#pragma once

#include "core/tensor.h"

namespace mllama {

constexpr char kPatchEmbedSchema[] =
    "patch_embed(Tensor pixel_values, Tensor weight, Tensor? bias) -> Tensor";
constexpr char kPatchEmbedBackwardSchema[] =
    "_patch_embed_backward(Tensor grad_y, Tensor pixel_values, Tensor weight, Tensor? bias, "
    "bool pixel_gradient, bool weight_gradient, bool bias_gradient) "
    "-> (Tensor grad_pixels, Tensor grad_weight, Tensor grad_bias)";

struct PatchEmbedArgs {
    PatchEmbedArgs(const char* op, const Tensor& pixels, const Tensor& weight_,
                   const MaybeTensor& bias_)
        : pixels(pixels) {
        dtype_of(op, "pixel_values", pixels);
        dtype_of(op, "weight", weight_);
        check(pixels.dim() == 4, op, "pixel_values");
        check(weight_.dim() == 4 && weight_.size(1) > 0 && weight_.size(2) == weight_.size(3) &&
                  weight_.size(2) > 0,
              op, "weight");
        embed = weight_.size(0), patch = weight_.size(2), width = weight_.size(1) * patch * patch;
        check(pixels.size(1) == weight_.size(1) && pixels.size(2) % patch == 0 &&
                  pixels.size(3) % patch == 0,
              op, "pixel_values");
        per_image = pixels.size(2) / patch * (pixels.size(3) / patch);
        patches = pixels.size(0) * per_image;
        weight = as_matrix(dense(to_dtype(weight_, pixels.scalar_type())), embed, width);
        if (!bias_) return;
        dtype_of(op, "bias", *bias_);
        check(bias_->dim() == 1 && bias_->size(0) == embed, op, "bias");
        bias = to_dtype(*bias_, pixels.scalar_type());
    }

    Tensor pixels;         // [B, C, rows * patch, columns * patch]
    Tensor weight;         // [embed, width], in pixels' dtype
    MaybeTensor bias;      // [embed], in pixels' dtype
    int64_t embed, patch;  // features of a patch, pixels of its side
    int64_t width;         // C * patch * patch
    int64_t per_image;     // rows * columns
    int64_t patches;       // B * rows * columns
};

}  // namespace mllama
