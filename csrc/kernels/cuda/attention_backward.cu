#include "kernels/cuda/attention_backward.cuh"

#include "kernels/cuda/attention.h"

namespace mllama::cuda {
namespace {

template <class Tiles, bool kOwnsKeys>
using Shape = typename FirstFitting<
    BackwardShape<Tiles, kOwnsKeys, 4, 32>, BackwardShape<Tiles, kOwnsKeys, 2, 32>,
    BackwardShape<Tiles, kOwnsKeys, 2, 16>, BackwardShape<Tiles, kOwnsKeys, 1, 16>,
    BackwardShape<Tiles, kOwnsKeys, 1, 8>>::type;

// Blocks for `count` keys or rows in each group.
template <class Shape>
unsigned blocks(const Attention& a, int64_t count) {
    int64_t tiles = (count + Shape::kOwn - 1) / Shape::kOwn;
    return static_cast<unsigned>(a.batch * a.kv_heads * Shape::kParts * tiles);
}

}  // namespace

void attention_backward(const AttentionBackward& a, Stream stream) {
    dispatch(a.dtype, [&](auto t) {
        launch(
            "attention_deltas", &attention_deltas<decltype(t)>,
            static_cast<unsigned>((a.batch * a.heads * a.queries + kDeltaWarps - 1) / kDeltaWarps),
            32 * kDeltaWarps, 0, stream, a);
    });
    choose_tiles(a, [&](auto tiles) {
        using Keys = Shape<typename decltype(tiles)::type, true>;
        using Rows = Shape<typename decltype(tiles)::type, false>;
        launch("attention_key_gradients", &attention_key_gradients<Keys>, blocks<Keys>(a, a.keys),
               Keys::kThreads, Keys::kBytes, stream, a);
        launch("attention_query_gradient", &attention_query_gradient<Rows>, blocks<Rows>(a, a.rows),
               Rows::kThreads, Rows::kBytes, stream, a);
    });
}

}  // namespace mllama::cuda
