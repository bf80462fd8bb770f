// Work on rows: a row has one warp if it is short, else all warps of a block. Its loops read
// kVector elements at a time where sizes and addresses allow that, else one.
#pragma once

#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/device.cuh"

namespace mllama::cuda {

constexpr int kRowBlockWarps = 8, kRowBlockThreads = 32 * kRowBlockWarps;
constexpr int64_t kShortRow = 512;  // elements

template <int kWarps>  // of a row: 1 or kRowBlockWarps
struct RowTeam {
    static constexpr int kThreads = 32 * kWarps, kRows = kRowBlockWarps / kWarps;

    MLLAMA_DEVICE int64_t first_row() const {
        return int64_t{blockIdx.x} * kRows + threadIdx.x / kThreads;
    }
    MLLAMA_DEVICE int64_t row_step() const { return int64_t{gridDim.x} * kRows; }
    // The sum, or the largest, of the row's threads. All threads of a block call it for the same
    // row, if it is one of several warps.
    MLLAMA_DEVICE float sum(float v) const { return reduce<Sum>(v); }
    MLLAMA_DEVICE float max(float v) const { return reduce<Largest>(v); }
    // Calls body(i) for the elements i ... i + N of the row that this thread has.
    template <int N, class Body>
    MLLAMA_DEVICE void for_elements(int64_t width, Body&& body) const {
        for (int64_t i = threadIdx.x % kThreads * N; i < width; i += kThreads * N) body(i);
    }

  private:
    template <class Combine>
    MLLAMA_DEVICE static float reduce(float v) {
        if constexpr (kWarps == 1) return warp_reduce<Combine>(v);
        return block_reduce<Combine, kWarps>(v);
    }
};

// Calls run(warps, N) with those that suit the rows, as std::integral_constant. T: the type that
// is loaded in vectors.
template <class T, class Run>
void choose_row_kernel(int64_t width, bool aligned, Run&& run) {
    using One = std::integral_constant<int, 1>;
    using All = std::integral_constant<int, kRowBlockWarps>;
    if (width <= kShortRow) {
        run(One{}, One{});
    } else if (aligned && width % kVector<T> == 0) {
        run(All{}, std::integral_constant<int, kVector<T>>{});
    } else {
        run(All{}, One{});
    }
}

// ---- sums over rows

constexpr int kColumnThreads = 128;

// Calls add(row, column, sums) for a part of the rows, and stores the sums as this part's.
template <int N, class Add>
MLLAMA_DEVICE void sum_part(float* parts, int64_t rows, int64_t width, Add&& add) {
    int64_t column = int64_t{blockIdx.x} * kColumnThreads + threadIdx.x, count = gridDim.y,
            part_rows = (rows + count - 1) / count, first = blockIdx.y * part_rows,
            last = first + part_rows < rows ? first + part_rows : rows;
    if (column >= width) return;
    float sums[N] = {};
    for (int64_t row = first; row < last; ++row) add(row, column, sums);
    MLLAMA_UNROLL for (int n = 0; n < N; ++n) {
        parts[(n * count + blockIdx.y) * width + column] = sums[n];
    }
}

template <class W, int N>
__global__ void __launch_bounds__(kColumnThreads)
    add_parts(ColumnSums<N> s, int64_t parts, int64_t width) {
    int64_t column = int64_t{blockIdx.x} * kColumnThreads + threadIdx.x;
    if (column >= width) return;
    MLLAMA_UNROLL for (int n = 0; n < N; ++n) {
        float sum = 0;
        for (int64_t part = 0; part < parts; ++part)
            sum += s.parts[(n * parts + part) * width + column];
        static_cast<W*>(s.sums[n])[column] = from_float<W>(sum);
    }
}

// Launches `kernel`, which calls sum_part, and adds its parts.
template <class W, int N, class Args>
void sum_columns(const char* name, void (*kernel)(Args, float*, int64_t), const Args& args,
                 const ColumnSums<N>& s, int64_t rows, int64_t width, Stream stream) {
    int64_t parts = column_parts(rows);
    unsigned blocks = static_cast<unsigned>((width + kColumnThreads - 1) / kColumnThreads);
    launch(name, kernel, dim3(blocks, static_cast<unsigned>(parts)), kColumnThreads, 0, stream,
           args, s.parts, rows);
    launch("add_parts", &add_parts<W, N>, blocks, kColumnThreads, 0, stream, s, parts, width);
}

}  // namespace mllama::cuda
