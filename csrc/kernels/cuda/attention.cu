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

template <class Shape, class Keys = KeyRows<typename Shape::Tiles::Element>>
void run(const AttentionForward& a, Stream stream) {
    int64_t tiles = (a.rows + Shape::kRows - 1) / Shape::kRows;
    launch("attention", &attention<Shape, Keys>,
           static_cast<unsigned>(a.batch * a.kv_heads * a.parts * tiles), Shape::kThreads,
           Shape::kBytes, stream, a);
}

template <class Out>
void merge(const AttentionForward& a, Stream stream) {
    int64_t rows = a.batch * a.kv_heads * a.rows;
    launch("merge_attention", &merge_attention<Out>,
           static_cast<unsigned>((rows + kMergeWarps - 1) / kMergeWarps), 32 * kMergeWarps, 0,
           stream, a);
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
    dispatch(a.dtype, [&](auto t) { merge<decltype(t)>(a, stream); });
}

int decode_part_keys(int64_t keys) {
    int64_t least = int64_t{kDecodePart} * kMostParts;
    return static_cast<int>(kDecodePart * std::max<int64_t>((keys + least - 1) / least, 1));
}

void attention_decode(const AttentionForward& a, bool quantized, Stream stream) {
    choose_tiles(a, [&](auto tiles) {
        using Tiles = typename decltype(tiles)::type;
        using Shape = FewRows<Tiles>;
        if constexpr (std::is_same_v<typename Tiles::Element, float>) {
            if (quantized) return run<Shape, QuantizedKeyRows>(a, stream);
        }
        run<Shape>(a, stream);
    });
    merge<float>(a, stream);
}

}  // namespace mllama::cuda
