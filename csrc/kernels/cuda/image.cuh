#pragma once

#include "kernels/cpu/image.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/image.h"

namespace mllama::cuda {

constexpr int kImageThreads = 256;

// Calls body(i) for the elements i < size that this thread has.
template <class Body>
MLLAMA_DEVICE void for_each(int64_t size, Body&& body) {
    int64_t i = int64_t{blockIdx.x} * kImageThreads + threadIdx.x;
    for (; i < size; i += int64_t{gridDim.x} * kImageThreads) body(i);
}

template <class Args>
__global__ void __launch_bounds__(kImageThreads) resize_axis(Args a) {
    using kernels::kFractionBits;
    for_each(a.outer * a.out_size * a.inner, [&](int64_t i) {
        int64_t line = i / a.inner, inner = i - line * a.inner;
        int64_t outer = line / a.out_size, place = line - outer * a.out_size;
        const uint8_t* in = a.in + (outer * a.in_size + a.first[place]) * a.inner + inner;
        const int32_t* weight = a.weight + place * a.most;
        uint32_t sum = 1u << (kFractionBits - 1);  // exact modulo 2^32
        for (int32_t k = 0; k < a.count[place]; ++k)
            sum += in[k * a.inner] * static_cast<uint32_t>(weight[k]);
        int32_t value = static_cast<int32_t>(sum) >> kFractionBits;
        a.out[i] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
    });
}

template <class Pixel>
__global__ void __launch_bounds__(kImageThreads)
    look_up(const Pixel* pixels, const float* table, float* planes, int64_t size) {
    for_each(3 * size, [&](int64_t i) {
        int64_t channel = i / size, pixel = i - channel * size;
        planes[i] = table[pixels[pixel * 3 + channel] * 3 + channel];
    });
}

}  // namespace mllama::cuda
