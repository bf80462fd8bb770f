// Launchers of rms_norm and its gradients; arguments as those of the CPU's kernels.
#pragma once

#include "kernels/cpu/rms_norm.h"
#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/stream.h"

namespace mllama::cuda {

void rms_norm(const kernels::RmsNorm& args, int64_t rows, Stream stream);
void rms_norm_backward(const kernels::RmsNormBackward& args, int64_t rows, Stream stream);
// The sum is of weight_dtype.
void rms_norm_weight_gradient(const kernels::RmsNormBackward& args, const ColumnSums<1>& sums,
                              int64_t rows, Stream stream);

}  // namespace mllama::cuda
