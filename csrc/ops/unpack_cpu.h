// Dequantizing blocks of a packed weight on torch's threads.
#pragma once

#include "core/threads.h"
#include "ops/packed_linear.h"

namespace mllama {

struct UnpackOnCpu {
    static constexpr int64_t kTileElements = int64_t{1} << 20;  // in the cache that cores share
    // x W' of 86 rows and 32,064 columns: 152 GFLOP/s in place of 108 (MKL, two threads).
    static constexpr int64_t kFloatColumns = 1024;

    static Tensor readable(const Tensor& weight) { return weight; }  // from any address
    // args.dense = the rows of the blocks [first, last).
    static void unpack(const kernels::PackWeight& args, int64_t first, int64_t last) {
        auto unpack = MLLAMA_CALL(unpack_blocks);
        int64_t block = args.width * kernels::kLanes;
        parallel_for(last - first, std::max<int64_t>(kGrain / std::max<int64_t>(block, 1), 1),
                     [&](int64_t begin, int64_t end) {
                         kernels::PackWeight part = args;
                         int64_t bytes = block * size_of(args.dtype);
                         part.dense = static_cast<char*>(args.dense) + begin * bytes;
                         unpack(part, first + begin, first + end);
                     });
    }
    static void unpack(const kernels::PackWeight& args, int64_t first, int64_t last, const Tensor&,
                       const Tensor&) {
        unpack(args, first, last);
    }
};

}  // namespace mllama
