#pragma once

#include "kernels/cpu/patch_embed.h"
#include "kernels/cuda/device.cuh"

namespace mllama::cuda {

constexpr int kPatchThreads = 256;

// Calls copy(pixel, element of a patch) for each of them that this thread has. T: as wide as one.
template <class T, class Copy>
MLLAMA_DEVICE void for_pixels(const kernels::Patches& a, int64_t count, Copy&& copy) {
    int64_t patch_size = a.channels * a.size * a.size, step = int64_t{gridDim.x} * kPatchThreads;
    int64_t i = int64_t{blockIdx.x} * kPatchThreads + threadIdx.x;
    for (; i < count * patch_size; i += step) {
        int64_t patch = i / patch_size, in_patch = i - patch * patch_size;
        int64_t x = in_patch % a.size, y = in_patch / a.size % a.size,
                channel = in_patch / a.size / a.size;
        int64_t column = patch % a.columns, row = patch / a.columns % a.rows,
                batch = patch / a.columns / a.rows;
        int64_t pixel = batch * a.batch_stride + channel * a.channel_stride +
                        (row * a.size + y) * a.line_stride + column * a.size + x;
        copy(reinterpret_cast<T*>(a.pixels)[pixel], reinterpret_cast<T*>(a.patches)[i]);
    }
}

template <class T>
__global__ void __launch_bounds__(kPatchThreads) cut_patches(kernels::Patches a, int64_t count) {
    for_pixels<T>(a, count, [](const T& pixel, T& element) { element = pixel; });
}

template <class T>
__global__ void __launch_bounds__(kPatchThreads) paste_patches(kernels::Patches a, int64_t count) {
    for_pixels<T>(a, count, [](T& pixel, const T& element) { pixel = element; });
}

}  // namespace mllama::cuda
