// packed_linear where x has many rows: arithmetic is all that counts there. Weights of kPanelBlocks
// blocks are unpacked once for all rows, a chunk of inputs at a time, to a panel in the first-level
// cache; register tiles run over it.
//
// Activations lie by chunks, [chunk][row][inputs of the chunk], so that the rows of a tile are
// neighbors in memory; so do their scales, [chunk][row][groups of the chunk]. In place of sums of
// codes there are floats, scale * sum. All take the memory that `Activations` has for rows in
// order.
#pragma once

#include "kernels/cpu/packed_linear.h"

namespace mllama::kernels {

constexpr int64_t kPanelBlocks = 3;

// a.activations of the rows [first, last)
MLLAMA_KERNEL(void, gemm_activations, (const PackedLinear& a, int64_t first, int64_t last))
// The columns of y that the blocks [first, last) give.
MLLAMA_KERNEL(void, gemm_product, (const PackedLinear& a, int64_t first, int64_t last))

}  // namespace mllama::kernels
