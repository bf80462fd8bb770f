#include "kernels/cuda/select_token.cuh"

#include "kernels/cuda/select_token.h"

namespace mllama::cuda {

void select_token(const kernels::SelectToken& a, float* scratch, int64_t rows, Stream stream) {
    dispatch(a.dtype, [&](auto t) {
        launch("select_token", &select_token<decltype(t)>, blocks_for(rows, 1), kSelectThreads, 0,
               stream, a, scratch, rows);
    });
}

}  // namespace mllama::cuda
