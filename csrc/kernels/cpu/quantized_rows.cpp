#include "kernels/cpu/quantized_rows.h"

#include <algorithm>
#include <cmath>

#include "simd/bytes.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

constexpr float kSmallestScale = 1e-36f;  // its inverse is finite

// Codes of one group, and its scale.
bf16 quantize_group(const float (&x)[kRowGroup], int8_t (&codes)[kRowGroup]) {
    vh half = narrow(splat(largest_size(x, kRowGroup) / 127.0f), bf16{});
    float scale = widen(half, bf16{})[0];
    if (scale < kSmallestScale) scale = 0, half = vh{};
    std::fill(codes, codes + kRowGroup, int8_t{0});
    if (!(scale > 0 && std::isfinite(scale))) return {half[0]};
    // The product is rounded with the sum that makes an integer of it, once, in an FMA; without one
    // in doubles, where it is exact. So codes are the same everywhere.
    float inverse = 1.0f / scale;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < kRowGroup; i += kWidth)
        store_bytes(codes + i, nearest_code(load(x + i) * inverse));
#else
    constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
    for (int i = 0; i < kRowGroup; ++i) {
        double code = static_cast<double>(x[i]) * inverse + kRounder - kRounder;
        codes[i] = static_cast<int8_t>(std::clamp(code, -127.0, 127.0));
    }
#endif
    return {half[0]};
}

}  // namespace

void quantize_rows(const void* x, Dtype dtype, int8_t* codes, int64_t rows, int64_t size) {
    dispatch(dtype, [&](auto t) {
        const auto* row = static_cast<const decltype(t)*>(x);
        for (int64_t r = 0; r < rows; ++r, row += size, codes += quantized_row_bytes(size)) {
            int8_t* scales = codes + size;
            for (int64_t g = 0; g < size; g += kRowGroup, scales += sizeof(bf16)) {
                float group[kRowGroup]{};
                int8_t own[kRowGroup];
                int64_t count = std::min(kRowGroup, size - g);
                for_vectors(count, [&](int64_t i, int n) { store(group + i, at(row + g + i, n)); });
                bf16 scale = quantize_group(group, own);
                std::memcpy(codes + g, own, count);
                std::memcpy(scales, &scale, sizeof scale);
            }
        }
    });
}

void dequantize_rows(const int8_t* codes, void* x, Dtype dtype, int64_t rows, int64_t size) {
    dispatch(dtype, [&](auto t) {
        auto* row = static_cast<decltype(t)*>(x);
        for (int64_t r = 0; r < rows; ++r, row += size, codes += quantized_row_bytes(size)) {
            for_vectors(size, [&](int64_t i, int n) {
                put(row + i,
                    load_codes(codes + i, n) * splat_bf16(codes + size + i / kRowGroup * 2), n);
            });
        }
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
