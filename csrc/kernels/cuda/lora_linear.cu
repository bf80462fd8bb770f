#include "kernels/cuda/lora_linear.cuh"

#include "kernels/cuda/lora_linear.h"

namespace mllama::cuda {
namespace {

dim3 tiles(int64_t rows, int64_t columns) {
    auto count = [](int64_t size) { return static_cast<unsigned>((size + kTile - 1) / kTile); };
    return dim3(count(rows), count(columns));
}

// Calls run(T{}, W{}) with the types of x and of the factor.
template <class Run>
void choose(const kernels::LowRank& a, Run&& run) {
    dispatch(a.dtype, [&](auto t) { dispatch(a.factor_dtype, [&](auto w) { run(t, w); }); });
}

}  // namespace

void low_rank_down(const kernels::LowRank& a, const int64_t* seed, Stream stream) {
    choose(a, [&](auto t, auto w) {
        using T = decltype(t);
        using W = decltype(w);
        if (a.rows < kFewRows) {
            launch("low_rank_dots", &low_rank_dots<T, W>, blocks_for(a.rows * a.rank, kDotWarps),
                   32 * kDotWarps, 0, stream, a, seed);
        } else {
            launch("low_rank_down", &low_rank_down<T, W>, tiles(a.rows, a.rank), kTileThreads, 0,
                   stream, a, seed);
        }
    });
}

void low_rank_up(const kernels::LowRank& a, const int64_t* seed, Stream stream) {
    choose(a, [&](auto t, auto w) {
        launch("low_rank_up", &low_rank_up<decltype(t), decltype(w)>, tiles(a.rows, a.width),
               kTileThreads, 0, stream, a, seed);
    });
}

void low_rank_outer(const kernels::LowRank& a, const int64_t* seed, Stream stream) {
    choose(a, [&](auto t, auto w) {
        launch("low_rank_outer", &low_rank_outer<decltype(t), decltype(w)>, tiles(a.width, a.rank),
               kTileThreads, 0, stream, a, seed);
    });
}

}  // namespace mllama::cuda
