// Launchers of what decode_step has beside the other operators' kernels. Rows are new positions, of
// row 0 of the batch, then of row 1, and so on.
#pragma once

#include <cstdint>

#include "kernels/cuda/stream.h"
#include "simd/types.h"

namespace mllama::cuda {

// What a step reads on the device before its first layer.
struct StepStart {
    int64_t batch, queries;
    int64_t capacity;          // positions that every cache has room for
    const int64_t* length;     // positions before the new ones
    const int64_t* first_key;  // [batch] or null
    const int64_t* positions;  // [rows], that rotate q and k
    int64_t half;              // of a head
};
// Stops the kernel where length or first_key do not fit; cos and sin of every position's angles,
// [rows, half].
void start_step(const StepStart& step, const float* frequencies, float* cos, float* sin,
                Stream stream);

// The heads of new positions, all [rows, its heads, size] and float32. Norms are those of heads.
struct NewHeads {
    Dtype dtype;  // of `query`, and of the caches, unless they are quantized
    bool quantized;
    int64_t rows, queries;
    int heads, kv_heads, size;
    float eps, norm_offset;
    const float *q, *k, *v;
    const float *q_norm, *k_norm;  // [size] or null
    const float *cos, *sin;        // [rows, size / 2]
    void* query;                   // [rows, heads, size]
    void *keys, *values;           // [batch, kv_heads, capacity, row], with `length` positions
    int64_t capacity, row;         // row: size, or the bytes of a quantized one
    const int64_t* length;
};
// Normalizes q and k, rotates them, and writes k and v to a cache; with kv_heads = 0, for layers
// that attend to images, q is normalized alone.
void place_heads(const NewHeads& heads, Stream stream);

// The rows of x, `width` wide, are multiplied by a factor; those that see no image become 0.
// sees_image: [rows] or null.
void scale_rows(float* x, int64_t rows, int64_t width, float factor, const bool* sees_image,
                Stream stream);

}  // namespace mllama::cuda
