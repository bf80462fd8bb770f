#include "kernels/cuda/decode.cuh"

#include "kernels/cuda/decode.h"

namespace mllama::cuda {

void start_step(const StepStart& s, const float* frequencies, float* cos, float* sin,
                Stream stream) {
    launch("start_step", &start_step<>, blocks_for(s.batch * s.queries * s.half, kStepThreads),
           kStepThreads, 0, stream, s, frequencies, cos, sin);
}

void place_heads(const NewHeads& a, Stream stream) {
    unsigned blocks = blocks_for(a.rows * (a.heads + 2 * a.kv_heads), kHeadWarps);
    if (a.quantized) {
        launch("place_heads", &place_heads<float, int8_t>, blocks, 32 * kHeadWarps, 0, stream, a);
        return;
    }
    dispatch(a.dtype, [&](auto t) {
        using T = decltype(t);
        launch("place_heads", &place_heads<T, T>, blocks, 32 * kHeadWarps, 0, stream, a);
    });
}

void scale_rows(float* x, int64_t rows, int64_t width, float factor, const bool* sees_image,
                Stream stream) {
    launch("scale_rows", &scale_rows<>, blocks_for(rows * width, kStepThreads), kStepThreads, 0,
           stream, x, rows, width, factor, sees_image);
}

}  // namespace mllama::cuda
