#include "kernels/cuda/rms_norm.cuh"

#include "kernels/cuda/rms_norm.h"

namespace mllama::cuda {

void rms_norm(const kernels::RmsNorm& a, int64_t rows, Stream stream) {
    bool aligned = are_aligned(a.x, a.residual, a.weight, a.hidden, a.y);
    dispatch(a.dtype, a.weight_dtype, [&](auto t, auto w) {
        using T = decltype(t);
        using W = decltype(w);
        choose_row_kernel<T>(a.width, aligned, [&](auto warps, auto n) {
            using Team = RowTeam<warps>;
            launch("rms_norm", &rms_norm<T, W, warps, n>, blocks_for(rows, Team::kRows),
                   kRowBlockThreads, 0, stream, a, rows);
        });
    });
}

void rms_norm_backward(const kernels::RmsNormBackward& a, int64_t rows, Stream stream) {
    bool aligned = are_aligned(a.grad_y, a.grad_hidden, a.x, a.weight, a.grad_x);
    dispatch(a.dtype, a.weight_dtype, [&](auto t, auto w) {
        using T = decltype(t);
        using W = decltype(w);
        choose_row_kernel<T>(a.width, aligned, [&](auto warps, auto n) {
            using Team = RowTeam<warps>;
            launch("rms_norm_backward", &rms_norm_backward<T, W, warps, n>,
                   blocks_for(rows, Team::kRows), kRowBlockThreads, 0, stream, a, rows);
        });
    });
}

void rms_norm_weight_gradient(const kernels::RmsNormBackward& a, const ColumnSums<1>& sums,
                              int64_t rows, Stream stream) {
    dispatch(a.dtype, a.weight_dtype, [&](auto t, auto w) {
        sum_columns<decltype(w)>("rms_norm_weight_gradient", &rms_norm_weight_gradient<decltype(t)>,
                                 a, sums, rows, a.width, stream);
    });
}

}  // namespace mllama::cuda
