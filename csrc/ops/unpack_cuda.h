// Dequantizing blocks of a packed weight on a GPU.
#pragma once

#include "core/launcher.h"
#include "kernels/cuda/packed_linear.h"
#include "ops/packed_linear.h"

namespace mllama {

struct UnpackOnCuda {
    static constexpr int64_t kTileElements = int64_t{1} << 24;  // enough work for all of a GPU
    static constexpr int64_t kFloatColumns = int64_t{1} << 40;  // all: cuBLAS chooses tiles

    // Kernels read words: a weight that begins between two, within another tensor, is copied.
    static Tensor readable(const Tensor& weight) {
        bool aligned = reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0;
        return aligned ? weight : torch::stable::clone(weight);
    }
    // tile = the rows of the blocks [first, last).
    static void unpack(kernels::PackWeight args, int64_t first, int64_t last, const Tensor& weight,
                       const Tensor& tile) {
        Launcher launcher("unpack_weight", weight);
        launcher.reads("weight", weight);
        launcher.writes("dense", tile);
        int64_t row = first * kernels::kLanes, rows = std::min(last * kernels::kLanes, args.out);
        args.packed += first * kernels::block_bytes(args.packing, args.in);
        args.out -= row;
        cuda::unpack_weight(args, nullptr, rows - row, launcher.stream());
        launcher.done();
    }
};

}  // namespace mllama
