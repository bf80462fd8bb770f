#include "kernels/cpu/image.h"

#include <cmath>

#include "core/tensor.h"

namespace mllama {
namespace {

constexpr int64_t kMaxPixels = int64_t{1} << 27;  // of the result and of the picture between the passes; ops/image.py

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

// What one output position sums along one dimension: Pillow's precompute_coeffs and normalize_coeffs_8bpc, operation by
// operation. (Compiled without FMA on x86: a fused product would round differently.)
struct Weights {
    int64_t taps;
    std::vector<int64_t> first;
    std::vector<int32_t> count, weights;

    Weights(int64_t in_size, int64_t out_size, bool cubic) : first(out_size), count(out_size) {
        const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
        const double widened = std::max(scale, 1.0), support = (cubic ? 2.0 : 1.0) * widened, per_pixel = 1.0 / widened;
        taps = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
        weights.assign(out_size * taps, 0);
        std::vector<double> exact(taps);
        for (int64_t i = 0; i < out_size; ++i) {
            const double center = (static_cast<double>(i) + 0.5) * scale;
            const int64_t low = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
            const int64_t high = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), in_size);
            double total = 0.0;
            for (int64_t k = 0; k < high - low; ++k) {
                const double x = (static_cast<double>(k + low) - center + 0.5) * per_pixel;
                exact[k] = cubic ? bicubic(x) : bilinear(x);
                total += exact[k];
            }
            for (int64_t k = 0; k < high - low; ++k) {
                const double share = total != 0.0 ? exact[k] / total : exact[k];
                const double units = share * (1 << kernels::kFractionBits);
                weights[i * taps + k] = static_cast<int32_t>(share < 0 ? units - 0.5 : units + 0.5);
            }
            first[i] = low;
            count[i] = static_cast<int32_t>(high - low);
        }
    }
};

// What a thread takes at least, where one costs `work` multiplications: some 30 us.
int64_t grain(int64_t work) { return std::max<int64_t>((1 << 19) / std::max<int64_t>(work, 1), 1); }

// The picture in another width, or in another height.
Tensor one_pass(const Tensor& image, int64_t size, bool is_width, bool cubic) {
    const int64_t in_height = image.size(0), in_width = image.size(1);
    if (size == (is_width ? in_width : in_height)) return image;
    const Weights weights(is_width ? in_width : in_height, size, cubic);
    const int64_t height = is_width ? in_height : size, width = is_width ? size : in_width;
    Tensor out = new_empty(image, {height, width, 3});
    kernels::Resize args{.taps = weights.taps,
                         .first = weights.first.data(),
                         .count = weights.count.data(),
                         .weights = weights.weights.data(),
                         .in_height = in_height,
                         .in_width = in_width,
                         .height = height,
                         .width = width,
                         .in = data<uint8_t>(image),
                         .out = mutable_data<uint8_t>(out)};
    const int64_t row_work = width * 3 * weights.taps;
    if (is_width) {
        auto kernel = MLLAMA_CALL(resize_width);
        const int64_t blocks = (height + kernels::kBlockRows - 1) / kernels::kBlockRows;
        parallel_for(blocks, grain(kernels::kBlockRows * row_work),
                     [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    } else {
        auto kernel = MLLAMA_CALL(resize_height);
        parallel_for(height, grain(row_work), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    }
    return out;
}

Tensor resized(const char* op, const Tensor& image, int64_t height, int64_t width, bool cubic, bool height_first) {
    check_value(image.scalar_type() == ScalarType::Byte && image.dim() == 3 && image.size(2) == 3 && image.numel() > 0,
                op, ": image must be uint8 [H, W, 3] and not empty");
    const int64_t between = height_first ? image.size(1) : image.size(0);  // of the picture after the first pass
    check_value(height >= 1 && width >= 1 && height <= kMaxPixels / width &&
                    between <= kMaxPixels / (height_first ? height : width),
                op, ": a result of ", height, " x ", width, " pixels is out of range");
    Tensor first = one_pass(dense(image), height_first ? height : width, !height_first, cubic);
    return one_pass(first, height_first ? width : height, height_first, cubic);
}

Tensor resize(const Tensor& image, int64_t height, int64_t width, bool cubic, bool height_first) {
    Tensor out = resized("resize", image, height, width, cubic, height_first);
    return out.const_data_ptr() == image.const_data_ptr() ? torch::stable::clone(out) : out;
}

Tensor resize_normalize(const Tensor& image, int64_t height, int64_t width, const Tensor& table, bool cubic,
                        bool height_first) {
    check_value(
        table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.size(0) == 256 && table.size(1) == 3,
        "resize_normalize: table must be float32 [256, 3]");
    Tensor pixels = resized("resize_normalize", image, height, width, cubic, height_first);
    Tensor planes = new_float(image, {3, height, width}), by_channel = dense(torch::stable::transpose(table, 0, 1));
    const float* values = data<float>(by_channel);
    const uint8_t* in = data<uint8_t>(pixels);
    float* out = mutable_data<float>(planes);
    auto kernel = MLLAMA_CALL(look_up);
    parallel_for(height * width, grain(3),
                 [&](int64_t begin, int64_t end) { kernel(in, values, out, height * width, begin, end); });
    return planes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    m.def("resize(Tensor image, int height, int width, bool cubic, bool height_first) -> Tensor");
    m.def(
        "resize_normalize(Tensor image, int height, int width, Tensor table, bool cubic, bool height_first) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    m.impl("resize", TORCH_BOX(&resize));
    m.impl("resize_normalize", TORCH_BOX(&resize_normalize));
}

}  // namespace mllama
