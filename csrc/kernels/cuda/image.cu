#include "kernels/cuda/image.cuh"

namespace mllama::cuda {

void resize_axis(const ResizeAxis& a, Stream stream) {
    launch("resize_axis", &resize_axis<ResizeAxis>,
           blocks_for(a.outer * a.out_size * a.inner, kImageThreads), kImageThreads, 0, stream, a);
}

void look_up(const uint8_t* pixels, const float* table, float* planes, int64_t size,
             Stream stream) {
    launch("look_up", &look_up<uint8_t>, blocks_for(3 * size, kImageThreads), kImageThreads, 0,
           stream, pixels, table, planes, size);
}

}  // namespace mllama::cuda
