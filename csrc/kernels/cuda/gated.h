// Launchers of the gated activations and their gradients; arguments as those of the CPU's kernels.
#pragma once

#include "kernels/cpu/gated.h"
#include "kernels/cuda/stream.h"

namespace mllama::cuda {

void gated(const kernels::Gated& args, int64_t size, Stream stream);  // elements of the result
void gated_backward(const kernels::GatedBackward& args, int64_t size, Stream stream);

}  // namespace mllama::cuda
