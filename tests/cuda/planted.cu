// Kernels with one mistake each, which the emulator must name, and right ones, which must pass:
// test_emulator.py runs them by name. They are templates, whose symbols are weak, as all kernels.
#include <cstring>

#include "kernels/cuda/device.cuh"
#include "planted.h"

namespace mllama::cuda::planted {

constexpr int kThreads = 64;
using Floats = Array<float, kThreads>;

#define KERNEL(name)   \
    template <class P> \
    __global__ void name([[maybe_unused]] P p)
#define COPY_TO_SHARED(s)     \
    MLLAMA_SHARED(Floats, s); \
    int i = threadIdx.x;      \
    s[i] = p.x[i]

// ---- right

KERNEL(reversed) {
    COPY_TO_SHARED(s);
    __syncthreads();
    p.out[i] = s[63 - i];
}
KERNEL(swapped_in_pairs) {
    COPY_TO_SHARED(s);
    __syncwarp();
    float v = s[i ^ 1];
    __syncwarp();
    p.out[i] = v + __shfl_xor_sync(kAllLanes, v, 1);
}
KERNEL(copied_asynchronously) {
    MLLAMA_SHARED(Floats, s);
    int i = threadIdx.x;
    if (i < 16) copy_async(&s[i * 4], p.in + i * 4, i < 15);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    p.out[i] = s[i];
}
// The last block adds what all have written. 4 blocks.
KERNEL(added_by_the_last_block) {
    MLLAMA_SHARED(bool, is_last);
    if (threadIdx.x < 16) p.out[blockIdx.x * 16 + threadIdx.x] = p.in[threadIdx.x] + blockIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(p.counts, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    p.x[threadIdx.x] = p.out[threadIdx.x] + p.out[63 - threadIdx.x];
}
// out[0 .. 64): the upper left 8x8 of A B', of two 16x16 matrices of f16 by rows. One warp.
template <class Multiply>
MLLAMA_DEVICE void multiply_matrices(const Planted& p, Multiply&& multiply) {
    using Halves = Array<uint16_t, 512>;
    MLLAMA_SHARED(Halves, s);
    int lane = threadIdx.x;
    for (int i = lane; i < 64; i += 32) copy_async(&s[i * 8], p.halves + i * 8, true);
    commit_copies();
    wait_for_copies<0>();
    __syncwarp();
    uint32_t a[4], b[4];
    ldmatrix(a, &s[lane % 16 * 16 + lane / 16 * 8]);
    ldmatrix(b, &s[256 + lane % 8 * 16 + lane / 8 % 2 * 8]);
    float d[4] = {};
    multiply(d, a, b);
    float pair[2] = {d[0], d[1]};
    store(p.out + lane / 4 * 8 + lane % 4 * 2, pair);
}
KERNEL(multiplied_by_16) {
    multiply_matrices(p, [](float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
        mma_16<f16>(d, a, {b[0], b[1]});
    });
}
KERNEL(multiplied_by_8) {
    multiply_matrices(p, [](float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
        mma_8(d, {a[0], a[1]}, b[0]);
        mma_8(d, {a[2], a[3]}, b[1]);
    });
}

// ---- wrong: races

KERNEL(missing_barrier) {
    COPY_TO_SHARED(s);
    p.out[i] = s[63 - i];
}
KERNEL(warp_barrier_between_warps) {
    COPY_TO_SHARED(s);
    __syncwarp();
    p.out[i] = s[i ^ 32];
}
KERNEL(shuffle_as_barrier) {
    COPY_TO_SHARED(s);
    float v = __shfl_xor_sync(kAllLanes, 1.0f, 1);
    p.out[i] = s[i ^ 1] * v;
}
KERNEL(overwritten_before_read) {
    COPY_TO_SHARED(s);
    __syncthreads();
    float v = s[63 - i];
    s[i] = v;
    p.out[i] = v;
}
KERNEL(blocks_add_to_one) {
    if (threadIdx.x == 0) p.x[0] = p.x[0] + 1;
}
KERNEL(missing_fence) {
    MLLAMA_SHARED(bool, is_last);
    if (threadIdx.x < 16) p.out[blockIdx.x * 16 + threadIdx.x] = p.in[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(p.counts, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (is_last) p.x[threadIdx.x] = p.out[63 - threadIdx.x];
}
KERNEL(missing_fence_after) {
    MLLAMA_SHARED(bool, is_last);
    if (threadIdx.x < 16) p.out[blockIdx.x * 16 + threadIdx.x] = p.in[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(p.counts, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (is_last) p.x[threadIdx.x] = p.out[63 - threadIdx.x];
}
KERNEL(atomic_beside_plain) {
    if (threadIdx.x == 0) p.counts[0] = 1;
    if (threadIdx.x == 40) atomicAdd(p.counts, 1u);
}

// ---- wrong: memory

KERNEL(past_the_end) { p.x[threadIdx.x + 1] = 0; }
KERNEL(before_the_beginning) { p.out[threadIdx.x] = p.in[static_cast<int>(threadIdx.x) - 1]; }
KERNEL(past_shared_memory) {
    using Few = Array<float, 60>;
    MLLAMA_SHARED(Few, s);
    s[threadIdx.x] = p.x[threadIdx.x];
}
KERNEL(unwritten_shared_memory) {
    using Many = Array<float, 65>;
    MLLAMA_SHARED(Many, s);
    s[threadIdx.x] = p.x[threadIdx.x];
    __syncthreads();
    p.out[threadIdx.x] = s[threadIdx.x + 1];
}
KERNEL(result_read_before_written) { p.out[threadIdx.x] = p.out[threadIdx.x] + 1; }
KERNEL(result_not_written) {
    if (threadIdx.x) p.out[threadIdx.x] = 1;
}
KERNEL(input_written) { const_cast<float*>(p.in)[threadIdx.x] = 1; }
KERNEL(misaligned_vector) {
    float v[4];
    load(v, p.in + threadIdx.x % 2);
    p.out[threadIdx.x] = v[0] + v[1] + v[2] + v[3];
}
KERNEL(misaligned_row) {
    using Halves = Array<uint16_t, 512>;
    MLLAMA_SHARED(Halves, s);
    for (int i = threadIdx.x; i < 512; i += 32) s[i] = p.halves[i];
    __syncwarp();
    uint32_t a[4];
    ldmatrix(a, &s[threadIdx.x * 4]);
    p.out[threadIdx.x] = to_float(f16{static_cast<uint16_t>(a[0])});
}
KERNEL(local_variable_of_another_thread) {
    using Places = Array<float*, kThreads>;
    MLLAMA_SHARED(Places, places);
    float own = p.in[threadIdx.x];
    places[threadIdx.x] = &own;
    __syncthreads();
    p.out[threadIdx.x] = *places[63 - threadIdx.x];
    __syncthreads();
}
KERNEL(too_much_shared_memory) {
    using Many = Array<float, 40 << 10>;
    MLLAMA_SHARED(Many, s);
    s[threadIdx.x] = 0;
}

// ---- wrong: threads that do not meet

KERNEL(divergent_barrier) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        p.out[threadIdx.x] = 0;
        __syncthreads();
    }
}
KERNEL(shuffle_with_ended_lanes) {
    if (threadIdx.x % 32 >= 16) return;
    p.out[threadIdx.x] = __shfl_xor_sync(kAllLanes, p.in[threadIdx.x], 1);
}
KERNEL(source_outside_of_mask) {
    if (threadIdx.x % 32 >= 16) return;
    p.out[threadIdx.x] = __shfl_xor_sync(0xffffu, p.in[threadIdx.x], 16);
}
KERNEL(masks_that_differ) {
    uint32_t mask = threadIdx.x % 32 < 16 ? 0xffffu : kAllLanes;
    p.out[threadIdx.x] = __shfl_xor_sync(mask, p.in[threadIdx.x], 1);
}
KERNEL(mma_in_half_a_warp) {
    float d[4] = {};
    if (threadIdx.x % 32 < 16) mma_8(d, {0, 0}, 0);
    __syncwarp();
    p.out[threadIdx.x] = d[0];
}

// ---- wrong: asynchronous copies

KERNEL(read_before_wait) {
    MLLAMA_SHARED(Floats, s);
    int i = threadIdx.x;
    if (i < 16) copy_async(&s[i * 4], p.in + i * 4, true);
    commit_copies();
    __syncthreads();
    float v = s[i];
    wait_for_copies<0>();
    p.out[i] = v;
}
KERNEL(wait_without_barrier) {
    MLLAMA_SHARED(Floats, s);
    int i = threadIdx.x;
    if (i < 16) copy_async(&s[i * 4], p.in + i * 4, true);
    commit_copies();
    wait_for_copies<0>();
    p.out[i] = s[i];
}
KERNEL(copy_over_what_is_read) {
    MLLAMA_SHARED(Floats, s);
    int i = threadIdx.x;
    float sum = 0;
    for (int step = 0; step < 2; ++step) {
        if (i < 16) copy_async(&s[i * 4], p.in + i * 4, true);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        sum += s[63 - i];
    }
    p.out[i] = sum;
}
KERNEL(never_waited_for) {
    MLLAMA_SHARED(Floats, s);
    if (threadIdx.x < 16) copy_async(&s[threadIdx.x * 4], p.in + threadIdx.x * 4, true);
    commit_copies();
}

#define CASE(name, ...) {#name, &name<Planted>, __VA_ARGS__}
const struct {
    const char* name;
    void (*kernel)(Planted);
    unsigned blocks, threads;
} kCases[] = {
    CASE(reversed, 1, 64),
    CASE(swapped_in_pairs, 1, 64),
    CASE(copied_asynchronously, 1, 64),
    CASE(added_by_the_last_block, 4, 64),
    CASE(multiplied_by_16, 1, 32),
    CASE(multiplied_by_8, 1, 32),
    CASE(missing_barrier, 1, 64),
    CASE(warp_barrier_between_warps, 1, 64),
    CASE(shuffle_as_barrier, 1, 64),
    CASE(overwritten_before_read, 1, 64),
    CASE(blocks_add_to_one, 2, 64),
    CASE(missing_fence, 4, 64),
    CASE(missing_fence_after, 4, 64),
    CASE(atomic_beside_plain, 1, 64),
    CASE(past_the_end, 1, 64),
    CASE(before_the_beginning, 1, 64),
    CASE(past_shared_memory, 1, 64),
    CASE(unwritten_shared_memory, 1, 64),
    CASE(result_read_before_written, 1, 64),
    CASE(result_not_written, 1, 64),
    CASE(input_written, 1, 64),
    CASE(misaligned_vector, 1, 32),
    CASE(misaligned_row, 1, 32),
    CASE(local_variable_of_another_thread, 1, 64),
    CASE(too_much_shared_memory, 1, 64),
    CASE(divergent_barrier, 1, 64),
    CASE(shuffle_with_ended_lanes, 1, 64),
    CASE(source_outside_of_mask, 1, 64),
    CASE(masks_that_differ, 1, 64),
    CASE(mma_in_half_a_warp, 1, 32),
    CASE(read_before_wait, 1, 64),
    CASE(wait_without_barrier, 1, 64),
    CASE(copy_over_what_is_read, 1, 64),
    CASE(never_waited_for, 1, 64),
    {"too_many_threads", &reversed<Planted>, 1, 1025},
};

bool launch_planted(const char* name, const Planted& arguments) {
    for (const auto& c : kCases) {
        if (std::strcmp(c.name, name)) continue;
        launch(name, c.kernel, c.blocks, c.threads, 0, nullptr, arguments);
        return true;
    }
    return false;
}

}  // namespace mllama::cuda::planted
