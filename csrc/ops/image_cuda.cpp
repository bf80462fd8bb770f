#include <cstring>

#include "core/launcher.h"
#include "kernels/cuda/image.h"
#include "ops/image.h"
#include "ops/resize_taps.h"

namespace mllama {
namespace {

// One direction's taps in the memory of an image's device: first and count of all results, then
// their weights.
Tensor on_device(const ResizeTaps& taps, const Tensor& image) {
    int64_t results = static_cast<int64_t>(taps.first.size());
    Tensor host = torch::stable::empty({results * (2 + taps.most)}, ScalarType::Int);
    auto* to = mutable_data<int32_t>(host);
    std::memcpy(to, taps.first.data(), results * sizeof *to);
    std::memcpy(to + results, taps.count.data(), results * sizeof *to);
    std::memcpy(to + 2 * results, taps.weight.data(), results * taps.most * sizeof *to);
    return torch::stable::to(host, image.device());
}

// The image with `size` rows, or columns: bytes [height, width, 3].
Tensor resized(const Tensor& image, bool rows, int64_t size, bool cubic) {
    int64_t height = image.size(0), width = image.size(1), in_size = rows ? height : width;
    if (size == in_size) return image;
    ResizeTaps taps(in_size, size, cubic);
    Tensor out = new_tensor(image, {rows ? size : height, rows ? width : size, 3});
    Tensor packed = on_device(taps, image);
    Launcher launcher("resize", image);
    launcher.reads("image", image);
    launcher.reads("taps", packed);
    launcher.writes("result", out);
    const auto* first = data<int32_t>(packed);
    cuda::resize_axis({.in = data<uint8_t>(image),
                       .out = mutable_data<uint8_t>(out),
                       .outer = rows ? 1 : height,
                       .in_size = in_size,
                       .out_size = size,
                       .inner = rows ? width * 3 : 3,
                       .first = first,
                       .count = first + size,
                       .weight = first + 2 * size,
                       .most = taps.most},
                      launcher.stream());
    launcher.done();
    return out;
}

Tensor resized(const Tensor& image, int64_t height, int64_t width, bool cubic, bool height_first) {
    Tensor between = resized(image, height_first, height_first ? height : width, cubic);
    return resized(between, !height_first, height_first ? width : height, cubic);
}

Tensor resize(const Tensor& image, int64_t height, int64_t width, bool cubic, bool height_first) {
    check_resize("resize", image, height, width, height_first);
    Tensor result = resized(dense(image), height, width, cubic, height_first);
    bool is_new = result.const_data_ptr() != image.const_data_ptr();
    return is_new ? result : torch::stable::clone(result);
}

Tensor resize_normalize(const Tensor& image, int64_t height, int64_t width, const Tensor& table_,
                        bool cubic, bool height_first) {
    const char* op = "resize_normalize";
    check_resize(op, image, height, width, height_first);
    check_table(op, table_);
    Tensor pixels = resized(dense(image), height, width, cubic, height_first);
    Tensor table = dense(table_), planes = new_float(image, {3, height, width});
    Launcher launcher(op, pixels);
    launcher.reads("image", pixels);
    launcher.reads("table", table);
    launcher.writes("result", planes);
    cuda::look_up(data<uint8_t>(pixels), data<float>(table), mutable_data<float>(planes),
                  height * width, launcher.stream());
    launcher.done();
    return planes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) {
    implement(m, "resize", TORCH_BOX(&resize));
    implement(m, "resize_normalize", TORCH_BOX(&resize_normalize));
}

}  // namespace mllama
