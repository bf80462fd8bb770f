// How CPU entries share out work among torch's threads.
#pragma once

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <atomic>
#include <memory>

#include "core/tensor.h"

namespace mllama {

// Whether this process was forked from one that had loaded this module. GNU OpenMP takes the
// parent's threads for its own there, and a parallel region waits for them forever: a forked
// process works on one thread.
inline std::atomic<bool> is_forked{false};
#if defined(__unix__) || defined(__APPLE__)
inline const int fork_watch = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
#endif

// Number of threads that a parallel region gets at most.
inline int64_t thread_count() {
    return is_forked ? 1 : std::max<int64_t>(torch::stable::get_num_threads(), 1);
}

// Runs body(begin, end) over [0, size) on torch's threads, in pieces of at least `grain`.
template <class Body>
void parallel_for(int64_t size, int64_t grain, Body&& body) {
    if (size <= grain || is_forked) {  // no parallel region for little work
        if (size > 0) body(int64_t{0}, size);
        return;
    }
    torch::stable::parallel_for(0, size, grain, body);
}

// Elements a thread takes at least: below this, opening a parallel region costs more than it saves.
constexpr int64_t kGrain = 16384;
inline int64_t row_grain(int64_t width) {
    return std::max<int64_t>(kGrain / std::max<int64_t>(width, 1), 1);
}

// Sums over rows, as gradients of weights are: `body(first_row, last_row, sums)` adds its rows'
// share to sums[0] ... sums[N - 1], float arrays of `width` zeros at first. Returns N float32
// tensors [width] on like's device. Rows are cut into equal parts, each summed in order, and the
// parts are added in order. How many there are depends on the sizes alone, so the bits do not
// depend on the number of threads.
template <size_t N, class Body>
std::array<Tensor, N> sums_over_rows(const Tensor& like, int64_t rows, int64_t width, Body&& body) {
    int64_t parts = std::clamp<int64_t>(rows / 32, 1, 16), part_rows = (rows + parts - 1) / parts,
            size = N * width;
    std::unique_ptr<float[]> memory(new float[parts * size]());
    parallel_for(parts, rows * width <= kGrain ? parts : 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            std::array<float*, N> sums;
            for (size_t i = 0; i < N; ++i) sums[i] = &memory[part * size + i * width];
            body(std::min(part * part_rows, rows), std::min((part + 1) * part_rows, rows), sums);
        }
    });
    for (int64_t part = 1; part < parts; ++part) {
        for (int64_t i = 0; i < size; ++i) memory[i] += memory[part * size + i];
    }
    std::array<Tensor, N> totals;
    for (size_t i = 0; i < N; ++i) {
        totals[i] = new_float(like, Sizes(&width, 1));
        std::copy_n(&memory[i * width], width, mutable_data<float>(totals[i]));
    }
    return totals;
}

}  // namespace mllama
