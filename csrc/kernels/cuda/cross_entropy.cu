#include "kernels/cuda/cross_entropy.cuh"

#include "kernels/cuda/cross_entropy.h"

namespace mllama::cuda {

void cross_entropy(const kernels::CrossEntropy& a, int64_t rows, Stream stream) {
    dispatch(a.dtype, [&](auto t) {
        using T = decltype(t);
        choose_row_kernel<T>(a.size, are_aligned(a.scores), [&](auto warps, auto n) {
            launch("cross_entropy", &cross_entropy<T, warps, n>,
                   blocks_for(rows, RowTeam<warps>::kRows), kRowBlockThreads, 0, stream, a, rows);
        });
    });
}

}  // namespace mllama::cuda
