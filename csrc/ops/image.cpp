#include "ops/image.h"

#include <cmath>

#include "core/threads.h"
#include "kernels/cpu/image.h"

namespace mllama {
namespace {

double bilinear(double x) {
    x = std::abs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::abs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

// The weights of one direction: Pillow's precompute_coeffs and normalize_coeffs_8bpc, operation by
// operation, then in pairs as the kernels read them. (Compiled without FMA on x86: a fused product
// would round differently.)
struct Weights {
    int64_t most;
    std::vector<int64_t> first;
    std::vector<int32_t> count, high, low;

    Weights(int64_t in_size, int64_t out_size, bool cubic) : first(out_size), count(out_size) {
        const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
        const double widened = std::max(scale, 1.0), support = (cubic ? 2.0 : 1.0) * widened,
                     per_pixel = 1.0 / widened;
        const int64_t taps = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
        most = taps / 2 + 1;
        high.assign(out_size * most, 0);
        low.assign(out_size * most, 0);
        std::vector<double> exact(taps);
        for (int64_t i = 0; i < out_size; ++i) {
            const double center = (static_cast<double>(i) + 0.5) * scale;
            const int64_t begin =
                std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
            const int64_t end =
                std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), in_size);
            double total = 0.0;
            for (int64_t k = begin; k < end; ++k) {
                const double x = (static_cast<double>(k) - center + 0.5) * per_pixel;
                exact[k - begin] = cubic ? bicubic(x) : bilinear(x);
                total += exact[k - begin];
            }
            first[i] = begin / 2;
            count[i] = static_cast<int32_t>((end + 1) / 2 - begin / 2);
            for (int64_t k = begin; k < end; ++k) {
                const double share = total != 0.0 ? exact[k - begin] / total : exact[k - begin];
                const double units = share * (1 << kernels::kFractionBits);
                const int32_t weight = static_cast<int32_t>(units < 0 ? units - 0.5 : units + 0.5);
                const int32_t upper =
                    (weight + (1 << (kernels::kLowBits - 1))) >> kernels::kLowBits;
                const int64_t at = i * most + k / 2 - begin / 2;
                high[at] |= half(upper, k % 2);
                low[at] |= half(weight - upper * (1 << kernels::kLowBits), k % 2);
            }
        }
    }

    // The low 16 bits of x, at the position of an even or an odd input.
    static int32_t half(int32_t x, bool odd) {
        const uint32_t bits = static_cast<uint16_t>(x);
        return static_cast<int32_t>(odd ? bits << 16 : bits);
    }
};

// Resize the width or the height.
Tensor one_pass(const Tensor& image, int64_t size, bool is_width, bool cubic) {
    const int64_t in_height = image.size(0), in_width = image.size(1);
    if (size == (is_width ? in_width : in_height)) return image;
    const Weights weights(is_width ? in_width : in_height, size, cubic);
    const int64_t height = is_width ? in_height : size, width = is_width ? size : in_width;
    Tensor out = new_empty(image, {height, width, 3});
    kernels::Resize args{.most = weights.most,
                         .first = weights.first.data(),
                         .count = weights.count.data(),
                         .high = weights.high.data(),
                         .low = weights.low.data(),
                         .in_height = in_height,
                         .in_width = in_width,
                         .height = height,
                         .width = width,
                         .in = data<uint8_t>(image),
                         .out = mutable_data<uint8_t>(out)};
    // At least about a millisecond of work per thread: less would not pay for waiting for it.
    const int64_t across = is_width ? height : width,
                  block_work = kernels::kBlock * 3 * size * 2 * weights.most;
    auto kernel = is_width ? MLLAMA_CALL(resize_width) : MLLAMA_CALL(resize_height);
    parallel_for((across + kernels::kBlock - 1) / kernels::kBlock,
                 std::max<int64_t>((1 << 24) / block_work, 1),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return out;
}

Tensor resized(const char* op, const Tensor& image, int64_t height, int64_t width, bool cubic,
               bool height_first) {
    check_resize(op, image, height, width, height_first);
    Tensor first = one_pass(dense(image), height_first ? height : width, !height_first, cubic);
    return one_pass(first, height_first ? width : height, height_first, cubic);
}

Tensor resize(const Tensor& image, int64_t height, int64_t width, bool cubic, bool height_first) {
    Tensor out = resized("resize", image, height, width, cubic, height_first);
    return out.const_data_ptr() == image.const_data_ptr() ? torch::stable::clone(out) : out;
}

Tensor resize_normalize(const Tensor& image, int64_t height, int64_t width, const Tensor& table,
                        bool cubic, bool height_first) {
    check_table("resize_normalize", table);
    Tensor pixels = resized("resize_normalize", image, height, width, cubic, height_first);
    Tensor planes = new_float(image, {3, height, width}),
           by_channel = dense(torch::stable::transpose(table, 0, 1));
    const float* values = data<float>(by_channel);
    const uint8_t* in = data<uint8_t>(pixels);
    float* out = mutable_data<float>(planes);
    auto kernel = MLLAMA_CALL(look_up);
    parallel_for(height * width, 1 << 18, [&](int64_t begin, int64_t end) {
        kernel(in, values, out, height * width, begin, end);
    });
    return planes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    define(m, kResizeSchema);
    define(m, kResizeNormalizeSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "resize", TORCH_BOX(&resize));
    implement(m, "resize_normalize", TORCH_BOX(&resize_normalize));
}

}  // namespace mllama
