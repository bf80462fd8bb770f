#include "ops/patch_embed.h"

#include "core/threads.h"
#include "kernels/cpu/patch_embed.h"

namespace mllama {
namespace {

kernels::Patches layout(const Tensor& pixels, const Tensor& patches, int64_t size) {
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
Tensor cut(const PatchEmbedArgs& a) {
    Tensor source = last_dense(a.pixels), patches = new_tensor(a.pixels, {a.patches, a.width});
    kernels::Patches args = layout(source, patches, a.patch);
    auto kernel = MLLAMA_CALL(cut_patches);
    parallel_for(a.patches, row_grain(a.width),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return patches;
}

// The inverse.
Tensor paste(const PatchEmbedArgs& a, const Tensor& patches) {
    Tensor pixels = new_like(a.pixels);
    kernels::Patches args = layout(pixels, patches, a.patch);
    auto kernel = MLLAMA_CALL(paste_patches);
    parallel_for(a.patches, row_grain(a.width),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return pixels;
}

Tensor patch_embed(const Tensor& pixels, const Tensor& weight, const MaybeTensor& bias) {
    PatchEmbedArgs a("patch_embed", pixels, weight, bias);
    Tensor y = new_tensor(pixels, {pixels.size(0), a.per_image, a.embed});
    linear_out(cut(a), a.weight, a.bias, as_matrix(y, a.patches, a.embed));
    return y;
}

// Each gradient is empty unless requested.
std::tuple<Tensor, Tensor, Tensor> patch_embed_backward(const Tensor& grad_y, const Tensor& pixels,
                                                        const Tensor& weight,
                                                        const MaybeTensor& bias,
                                                        bool pixel_gradient, bool weight_gradient,
                                                        bool bias_gradient) {
    const char* op = "_patch_embed_backward";
    PatchEmbedArgs a(op, pixels, weight, bias);
    check(grad_y.numel() == a.patches * a.embed && grad_y.scalar_type() == pixels.scalar_type(), op,
          "grad_y");
    Tensor g = as_matrix(dense(grad_y), a.patches, a.embed);
    Tensor grad_pixels = new_tensor(pixels, {0}), grad_weight = new_tensor(weight, {0});
    Tensor grad_bias = new_tensor(bias.value_or(weight), {0});
    if (pixel_gradient) {
        grad_pixels = paste(a, to_dtype(torch::stable::matmul(g, a.weight), pixels.scalar_type()));
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    define(m, kPatchEmbedSchema);
    define(m, kPatchEmbedBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "patch_embed", TORCH_BOX(&patch_embed));
    implement(m, "_patch_embed_backward", TORCH_BOX(&patch_embed_backward));
}

}  // namespace mllama
