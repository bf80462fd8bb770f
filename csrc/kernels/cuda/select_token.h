// Launcher of select_token; arguments as those of the CPU's kernel.
#pragma once

#include "kernels/cpu/select_token.h"
#include "kernels/cuda/stream.h"

namespace mllama::cuda {

// scratch: [rows, 2, size]; not read without `uniform`.
void select_token(const kernels::SelectToken& args, float* scratch, int64_t rows, Stream stream);

}  // namespace mllama::cuda
