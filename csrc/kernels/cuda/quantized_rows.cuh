#pragma once

#include "kernels/cpu/quantized_rows.h"
#include "kernels/cuda/device.cuh"

namespace mllama::cuda {

constexpr int kQuantizeWarps = 8;         // of a block
constexpr float kSmallestScale = 1e-36f;  // its inverse is finite, as on the CPU

// The scale of a group, a bf16 that need not be aligned.
MLLAMA_DEVICE float load_scale(const int8_t* at) {
    uint32_t low = static_cast<uint8_t>(at[0]), high = static_cast<uint8_t>(at[1]);
    return to_float(bf16{static_cast<uint16_t>(low | high << 8)});
}
MLLAMA_DEVICE void store_scale(int8_t* at, bf16 scale) {
    at[0] = static_cast<int8_t>(scale.bits & 0xff);
    at[1] = static_cast<int8_t>(scale.bits >> 8);
}

// The largest absolute value of the warp; NaN if one is not finite.
MLLAMA_DEVICE float warp_largest_size(float v) {
    uint32_t size = __float_as_uint(v) & 0x7fffffffu;  // as integers sizes have the same order
    MLLAMA_UNROLL for (int step = 16; step; step /= 2) {
        uint32_t other = __shfl_xor_sync(kAllLanes, size, step);
        size = size > other ? size : other;
    }
    float largest = __uint_as_float(size);
    return largest + largest * 0.0f;
}

// The integer from -127 to 127 that is nearest to v * inverse, halves to even; 0 for NaN.
MLLAMA_DEVICE int8_t nearest_code(float v, float inverse) {
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded
    float code = fmaf(v, inverse, kRounder) - kRounder;  // so the product is not, as on the CPU
    if (code != code) return 0;
    return static_cast<int8_t>(fminf(fmaxf(code, -127.0f), 127.0f));
}

// A warp writes a group of a row of `size` codes. A lane has an element; 0 behind the row's end.
MLLAMA_DEVICE void store_group(int8_t* row, int64_t size, int64_t group, float v) {
    int64_t column = group * kernels::kRowGroup + threadIdx.x % 32;
    bf16 scale = from_float<bf16>(warp_largest_size(v) / 127.0f);
    if (to_float(scale) < kSmallestScale) scale = bf16{0};
    float inverse = to_float(scale) > 0 ? 1.0f / to_float(scale) : 0.0f;
    if (column < size) row[column] = nearest_code(v, inverse);
    if (threadIdx.x % 32 == 0) store_scale(row + size + group * sizeof(bf16), scale);
}

// Four elements from `column` on, a multiple of 4, of a row at a multiple of 4 bytes.
MLLAMA_DEVICE void dequantize_four(float (&to)[4], const int8_t* row, int64_t size,
                                   int64_t column) {
    float scale[1];
    load(scale, reinterpret_cast<const bf16*>(row + size) + column / kernels::kRowGroup);
    load(to, row + column);
    MLLAMA_UNROLL for (int i = 0; i < 4; ++i) to[i] *= scale[0];
}

MLLAMA_DEVICE float dequantized(const int8_t* row, int64_t size, int64_t column) {
    float scale = load_scale(row + size + column / kernels::kRowGroup * sizeof(bf16));
    return static_cast<float>(row[column]) * scale;
}

// A warp has a group of kRowGroup elements, a lane one.
template <class T>
__global__ void __launch_bounds__(32 * kQuantizeWarps)
    quantize_rows(const T* x, int8_t* codes, int64_t rows, int64_t size, int64_t row_bytes) {
    int64_t groups = (size + kernels::kRowGroup - 1) / kernels::kRowGroup;
    int64_t i = int64_t{blockIdx.x} * kQuantizeWarps + threadIdx.x / 32;
    for (; i < rows * groups; i += int64_t{gridDim.x} * kQuantizeWarps) {
        int64_t row = i / groups, group = i - row * groups;
        int64_t column = group * kernels::kRowGroup + threadIdx.x % 32;
        float v = column < size ? to_float(x[row * size + column]) : 0.0f;
        store_group(codes + row * row_bytes, size, group, v);
    }
}

template <class T>
__global__ void __launch_bounds__(32 * kQuantizeWarps)
    dequantize_rows(const int8_t* codes, T* x, int64_t rows, int64_t size, int64_t row_bytes) {
    constexpr int kThreads = 32 * kQuantizeWarps;
    int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    for (; i < rows * size; i += int64_t{gridDim.x} * kThreads) {
        int64_t row = i / size, column = i - row * size;
        x[i] = from_float<T>(dequantized(codes + row * row_bytes, size, column));
    }
}

}  // namespace mllama::cuda
