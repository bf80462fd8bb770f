#include "kernels/cuda/attention.cuh"

#include <algorithm>

#include "kernels/cuda/attention.h"

namespace mllama::cuda {
namespace {

// Up to this many rows of a group are one warp's, and the block's warps have different keys.
constexpr int kFewRows = 16;
// A launch has so many blocks, if there are keys enough for parts of at least so many keys.
constexpr int64_t kBlocks = 256, kPartKeys = 128;

template <class Tiles>
using ManyRows = typename FirstFitting<ForwardShape<Tiles, 4, 1, 64>, ForwardShape<Tiles, 4, 1, 32>,
                                       ForwardShape<Tiles, 4, 1, 16>, ForwardShape<Tiles, 2, 1, 16>,
                                       ForwardShape<Tiles, 1, 1, 16>>::type;
template <class Tiles>
using FewRows = typename FirstFitting<ForwardShape<Tiles, 1, 4, 16>, ForwardShape<Tiles, 1, 2, 16>,
                                      ForwardShape<Tiles, 1, 1, 16>>::type;

template <class Shape>
void run(const AttentionForward& a, Stream stream) {
    int64_t tiles = (a.rows + Shape::kRows - 1) / Shape::kRows;
    launch("attention", &attention<Shape>,
           static_cast<unsigned>(a.batch * a.kv_heads * a.parts * tiles), Shape::kThreads,
           Shape::kBytes, stream, a);
}

}  // namespace

int attention_parts(const Attention& a) {
    int64_t rows = a.rows <= kFewRows ? kFewRows : 64,
            blocks = a.batch * a.kv_heads * ((a.rows + rows - 1) / rows),
            most = std::max<int64_t>((a.keys + kPartKeys - 1) / kPartKeys, 1);
    return static_cast<int>(std::clamp<int64_t>(blocks ? kBlocks / blocks : 1, 1, most));
}

void attention(const AttentionForward& a, Stream stream) {
    choose_tiles(a, [&](auto tiles) {
        using Tiles = typename decltype(tiles)::type;
        if (a.rows <= kFewRows) {
            run<FewRows<Tiles>>(a, stream);
        } else {
            run<ManyRows<Tiles>>(a, stream);
        }
    });
    if (a.parts == 1) return;
    dispatch(a.dtype, [&](auto t) {
        launch(
            "merge_attention", &merge_attention<decltype(t)>,
            static_cast<unsigned>((a.batch * a.kv_heads * a.rows + kMergeWarps - 1) / kMergeWarps),
            32 * kMergeWarps, 0, stream, a);
    });
}

}  // namespace mllama::cuda
