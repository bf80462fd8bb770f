// Launcher of the cross entropy; arguments as those of the CPU's kernel.
#pragma once

#include "kernels/cpu/cross_entropy.h"
#include "kernels/cuda/stream.h"

namespace mllama::cuda {

void cross_entropy(const kernels::CrossEntropy& args, int64_t rows, Stream stream);

}  // namespace mllama::cuda
