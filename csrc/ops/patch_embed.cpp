#include "kernels/cpu/patch_embed.h"

#include "core/rows.h"
#include "core/tensor.h"

namespace mllama {
namespace {

void check_sizes(const char* op, const Tensor& pixels, const Tensor& weight) {
    dtype_of(op, "pixel_values", pixels);
    dtype_of(op, "weight", weight);
    check_value(pixels.dim() == 4, op, ": pixel_values must be [B, C, height, width], got ",
                Shape{pixels});
    check_value(weight.dim() == 4 && weight.size(1) > 0 && weight.size(2) == weight.size(3) &&
                    weight.size(2) > 0,
                op, ": weight must be [E, C, p, p] with C and p > 0, got ", Shape{weight});
    check_value(pixels.size(1) == weight.size(1), op, ": pixel_values have ", pixels.size(1),
                " channels, weight takes ", weight.size(1));
    int64_t patch = weight.size(2);
    check_value(pixels.size(2) % patch == 0 && pixels.size(3) % patch == 0, op, ": a picture of ",
                pixels.size(2), " x ", pixels.size(3), " pixels cannot be cut into patches of ",
                patch, " x ", patch);
}

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

// [B * rows * columns, C p p]
Tensor cut(const Tensor& pixels, int64_t size) {
    int64_t width = pixels.size(1) * size * size,
            count = pixels.numel() / std::max<int64_t>(width, 1);
    Tensor source = last_dense(pixels), patches = new_tensor(pixels, {count, width});
    kernels::Patches args = layout(source, patches, size);
    auto kernel = MLLAMA_CALL(cut_patches);
    parallel_for(count, row_grain(width),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return patches;
}

Tensor paste(const Tensor& patches, const Tensor& like, int64_t size) {
    Tensor pixels = new_like(like);
    kernels::Patches args = layout(pixels, patches, size);
    auto kernel = MLLAMA_CALL(paste_patches);
    parallel_for(patches.size(0), row_grain(patches.size(1)),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return pixels;
}

Tensor patch_embed(const Tensor& pixels, const Tensor& weight, const std::optional<Tensor>& bias) {
    check_sizes("patch_embed", pixels, weight);
    int64_t embed = weight.size(0), patch = weight.size(2), width = weight.size(1) * patch * patch;
    std::optional<Tensor> b;
    if (bias) {
        dtype_of("patch_embed", "bias", *bias);
        check_value(bias->dim() == 1 && bias->size(0) == embed, "patch_embed: bias must be [",
                    embed, "], got ", Shape{*bias});
        b = to_dtype(*bias, pixels.scalar_type());
    }
    Tensor matrix = as_matrix(dense(to_dtype(weight, pixels.scalar_type())), embed, width);
    int64_t patches = pixels.size(2) / patch * (pixels.size(3) / patch);
    Tensor y = new_tensor(pixels, {pixels.size(0), patches, embed});
    linear_out(cut(pixels, patch), matrix, b, as_matrix(y, pixels.size(0) * patches, embed));
    return y;
}

// Each gradient is empty unless asked for.
std::tuple<Tensor, Tensor, Tensor> patch_embed_backward(const Tensor& grad_y, const Tensor& pixels,
                                                        const Tensor& weight,
                                                        const std::optional<Tensor>& bias,
                                                        bool pixel_gradient, bool weight_gradient,
                                                        bool bias_gradient) {
    const char* op = "_patch_embed_backward";
    check_sizes(op, pixels, weight);
    int64_t embed = weight.size(0), patch = weight.size(2), width = weight.size(1) * patch * patch;
    int64_t count = pixels.numel() / std::max<int64_t>(width, 1);
    check_value(grad_y.numel() == count * embed && grad_y.scalar_type() == pixels.scalar_type(), op,
                ": grad_y must be [B, patches, ", embed, "] and of pixel_values' dtype");
    Tensor g = as_matrix(dense(grad_y), count, embed);
    Tensor grad_pixels = new_tensor(pixels, {0}), grad_weight = new_tensor(weight, {0});
    Tensor grad_bias = new_tensor(bias.value_or(weight), {0});
    if (pixel_gradient) {
        Tensor matrix = as_matrix(dense(to_dtype(weight, pixels.scalar_type())), embed, width);
        grad_pixels =
            paste(to_dtype(torch::stable::matmul(g, matrix), pixels.scalar_type()), pixels, patch);
    }
    if (weight_gradient) {
        Tensor sum = torch::stable::matmul(torch::stable::transpose(g, 0, 1), cut(pixels, patch));
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
    m.def("patch_embed(Tensor pixel_values, Tensor weight, Tensor? bias) -> Tensor");
    m.def(
        "_patch_embed_backward(Tensor grad_y, Tensor pixel_values, Tensor weight, Tensor? bias, "
        "bool pixel_gradient, bool weight_gradient, bool bias_gradient) -> (Tensor grad_pixels, "
        "Tensor grad_weight, "
        "Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    m.impl("patch_embed", TORCH_BOX(&patch_embed));
    m.impl("_patch_embed_backward", TORCH_BOX(&patch_embed_backward));
}

}  // namespace mllama
