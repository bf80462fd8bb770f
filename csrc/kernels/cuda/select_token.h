// Launcher of select_token; arguments as those of the CPU's kernel.
#pragma once

#include "kernels/cpu/select_token.h"
#include "kernels/cuda/stream.h"

namespace mllama::cuda {

// scores: scratch, [rows, size].
void select_token(const kernels::SelectToken& args, float* scores, int64_t rows, Stream stream);

}  // namespace mllama::cuda
