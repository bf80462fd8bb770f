#pragma once

#include "kernels/cpu/gated.h"

namespace mllama::kernels {

// Both work on the elements [first, last), counted through the rows.
MLLAMA_KERNEL(void, geglu, (const Gated& args, int64_t first, int64_t last))
MLLAMA_KERNEL(void, geglu_backward, (const GatedBackward& args, int64_t first, int64_t last))

}  // namespace mllama::kernels
