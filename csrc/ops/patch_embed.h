// patch_embed: schemas, checks, and all but the copies, shared by all devices.
#pragma once

#include "core/tensor.h"
#include "kernels/cpu/patch_embed.h"

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

// What a device has: cut(args, pixels, patches, count) copies images to rows of patches,
// paste(...) copies them back.
template <class Device>
class PatchEmbed {
  public:
    static Tensor forward(const Tensor& pixels, const Tensor& weight, const MaybeTensor& bias) {
        PatchEmbedArgs a("patch_embed", pixels, weight, bias);
        Tensor y = new_tensor(pixels, {pixels.size(0), a.per_image, a.embed});
        linear_out(cut(a), a.weight, a.bias, as_matrix(y, a.patches, a.embed));
        return y;
    }

    // Each gradient is empty unless requested.
    static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& pixels,
                                                       const Tensor& weight,
                                                       const MaybeTensor& bias, bool pixel_gradient,
                                                       bool weight_gradient, bool bias_gradient) {
        const char* op = "_patch_embed_backward";
        PatchEmbedArgs a(op, pixels, weight, bias);
        check(grad_y.numel() == a.patches * a.embed && grad_y.scalar_type() == pixels.scalar_type(),
              op, "grad_y");
        Tensor g = as_matrix(dense(grad_y), a.patches, a.embed);
        Tensor grad_pixels = new_tensor(pixels, {0}), grad_weight = new_tensor(weight, {0});
        Tensor grad_bias = new_tensor(bias.value_or(weight), {0});
        if (pixel_gradient) {
            grad_pixels =
                paste(a, to_dtype(torch::stable::matmul(g, a.weight), pixels.scalar_type()));
        }
        if (weight_gradient) {
            Tensor sum = torch::stable::matmul(torch::stable::transpose(g, 0, 1), cut(a));
            grad_weight = torch::stable::view(to_dtype(sum, weight.scalar_type()), weight.sizes());
        }
        if (bias_gradient && bias) {
            int64_t rows = 0;
            grad_bias = torch::stable::sum(g, Sizes(&rows, 1), false, bias->scalar_type());
        }
        return {grad_pixels, grad_weight, grad_bias};
    }

  private:
    static kernels::Patches layout(const Tensor& pixels, const Tensor& patches, int64_t size) {
        return {.element = static_cast<int64_t>(pixels.element_size()),
                .channels = pixels.size(1),
                .rows = pixels.size(2) / size,
                .columns = pixels.size(3) / size,
                .size = size,
                .batch_stride = pixels.stride(0),
                .channel_stride = pixels.stride(1),
                .line_stride = pixels.stride(2),
                .pixels = static_cast<char*>(const_cast<void*>(pixels.const_data_ptr())),
                .patches = static_cast<char*>(const_cast<void*>(patches.const_data_ptr()))};
    }

    // The image as rows of patches, [patches, width].
    static Tensor cut(const PatchEmbedArgs& a) {
        Tensor source = last_dense(a.pixels), patches = new_tensor(a.pixels, {a.patches, a.width});
        Device::cut(layout(source, patches, a.patch), source, patches, a.patches);
        return patches;
    }

    // The inverse.
    static Tensor paste(const PatchEmbedArgs& a, const Tensor& patches) {
        Tensor pixels = new_like(a.pixels), source = dense(patches);
        Device::paste(layout(pixels, source, a.patch), pixels, source, a.patches);
        return pixels;
    }
};

}  // namespace mllama
