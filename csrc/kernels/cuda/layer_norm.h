// Launchers of layer_norm and its gradients; arguments as those of the CPU's kernels.
#pragma once

#include "kernels/cpu/layer_norm.h"
#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/stream.h"

namespace mllama::cuda {

void layer_norm(const kernels::LayerNorm& args, int64_t rows, Stream stream);
void layer_norm_backward(const kernels::LayerNormBackward& args, int64_t rows, Stream stream);
// The sums, of weight and bias, are of weight_dtype.
void layer_norm_parameter_gradients(const kernels::LayerNormBackward& args,
                                    const ColumnSums<2>& sums, int64_t rows, Stream stream);

}  // namespace mllama::cuda
