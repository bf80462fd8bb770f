#include "kernels/cuda/rope.cuh"

#include "kernels/cuda/rope.h"

namespace mllama::cuda {
namespace {

bool are_rows_aligned(const kernels::RopeHeads& h, int vector) {
    return are_aligned(h.x, h.y) && h.batch_stride % vector == 0 && h.token_stride % vector == 0 &&
           h.head_stride % vector == 0;
}

}  // namespace

void rope(const kernels::Rope& a, int64_t batch, Stream stream) {
    int64_t tokens = batch * a.tokens, pairs = tokens * (a.q.heads + a.k.heads) * a.half;
    dispatch(a.dtype, [&](auto t) {
        using T = decltype(t);
        constexpr int N = kVector<T>;
        bool vectors = a.half % N == 0 && are_aligned(a.cos, a.sin) && are_rows_aligned(a.q, N) &&
                       are_rows_aligned(a.k, N);
        launch("rope", vectors ? &rope<T, N> : &rope<T, 1>,
               blocks_for(vectors ? pairs / N : pairs, kRopeThreads), kRopeThreads, 0, stream, a,
               tokens);
    });
}

}  // namespace mllama::cuda
