// Launchers of products with packed weights, in the layout of kernels/cpu/packed_linear.h.
#pragma once

#include "kernels/cpu/packed_linear.h"
#include "kernels/cuda/stream.h"

namespace mllama::cuda {

// Inputs that a product takes at a time. Rows of codes and scales are padded with zeros to whole
// chunks.
constexpr int64_t kChunkInputs = 128, kChunkGroups = kChunkInputs / kernels::kGroup;
constexpr int64_t chunk_count(int64_t in) { return (in + kChunkInputs - 1) / kChunkInputs; }

// x as codes: a.activations.codes [rows, chunks * kChunkInputs], .scales [rows, chunks *
// kChunkGroups] and, as many in .values, each group's scale times the sum of its codes.
void quantize_activations(const kernels::PackedLinear& a, Stream stream);
// y, from a.activations where the weights are codes.
void packed_linear(const kernels::PackedLinear& a, Stream stream);
// The same for few rows and up to kMostProducts layers with one x, which differ in `packing`,
// `weight`, `bias`, `y` and `out`: one launch for those beside each other of one format.
constexpr int kMostProducts = 3;
void packed_linears(const kernels::PackedLinear* products, int count, Stream stream);
// Dense rows of a packed weight: all of them, or those that `rows` names.
void unpack_weight(const kernels::PackWeight& a, const int64_t* rows, int64_t count, Stream stream);

}  // namespace mllama::cuda
