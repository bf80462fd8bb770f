// Launcher of rope; arguments as those of the CPU's kernel.
#pragma once

#include "kernels/cpu/rope.h"
#include "kernels/cuda/stream.h"

namespace mllama::cuda {

void rope(const kernels::Rope& args, int64_t batch, Stream stream);

}  // namespace mllama::cuda
