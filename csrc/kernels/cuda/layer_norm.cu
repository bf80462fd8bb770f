#include "kernels/cuda/layer_norm.cuh"

#include "kernels/cuda/layer_norm.h"

namespace mllama::cuda {

void layer_norm(const kernels::LayerNorm& a, int64_t rows, Stream stream) {
    bool aligned = are_aligned(a.x, a.weight, a.bias, a.y);
    dispatch(a.dtype, a.weight_dtype, [&](auto t, auto w) {
        using T = decltype(t);
        using W = decltype(w);
        choose_row_kernel<T>(a.width, aligned, [&](auto warps, auto n) {
            using Team = RowTeam<warps>;
            launch("layer_norm", &layer_norm<T, W, warps, n>, blocks_for(rows, Team::kRows),
                   kRowBlockThreads, 0, stream, a, rows);
        });
    });
}

void layer_norm_backward(const kernels::LayerNormBackward& a, int64_t rows, Stream stream) {
    bool aligned = are_aligned(a.grad_y, a.x, a.weight, a.grad_x);
    dispatch(a.dtype, a.weight_dtype, [&](auto t, auto w) {
        using T = decltype(t);
        using W = decltype(w);
        choose_row_kernel<T>(a.width, aligned, [&](auto warps, auto n) {
            using Team = RowTeam<warps>;
            launch("layer_norm_backward", &layer_norm_backward<T, W, warps, n>,
                   blocks_for(rows, Team::kRows), kRowBlockThreads, 0, stream, a, rows);
        });
    });
}

void layer_norm_parameter_gradients(const kernels::LayerNormBackward& a, const ColumnSums<2>& sums,
                                    int64_t rows, Stream stream) {
    dispatch(a.dtype, a.weight_dtype, [&](auto t, auto w) {
        sum_columns<decltype(w)>("layer_norm_parameter_gradients",
                                 &layer_norm_parameter_gradients<decltype(t)>, a, sums, rows,
                                 a.width, stream);
    });
}

}  // namespace mllama::cuda
