// resize and resize_normalize: schemas and checks, shared by all devices.
#pragma once

#include "core/tensor.h"

namespace mllama {

constexpr char kResizeSchema[] =
    "resize(Tensor image, int height, int width, bool cubic, bool height_first) -> Tensor";
constexpr char kResizeNormalizeSchema[] =
    "resize_normalize(Tensor image, int height, int width, Tensor table, bool cubic, "
    "bool height_first) -> Tensor";

// Limit of the result and of the image between the two passes; as in ops/image.py.
constexpr int64_t kMaxPixels = int64_t{1} << 27;

inline void check_resize(const char* op, const Tensor& image, int64_t height, int64_t width,
                         bool height_first) {
    check(image.scalar_type() == ScalarType::Byte && image.dim() == 3 && image.size(2) == 3 &&
              image.numel() > 0,
          op, "image");
    // The side of the image that the first pass does not change.
    const int64_t between = height_first ? image.size(1) : image.size(0);
    check(height >= 1 && width >= 1 && height <= kMaxPixels / width &&
              between <= kMaxPixels / (height_first ? height : width),
          op, "height or width");
}

inline void check_table(const char* op, const Tensor& table) {
    check(table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.size(0) == 256 &&
              table.size(1) == 3,
          op, "table");
}

}  // namespace mllama
