// Rows of one dtype to another.
#pragma once

#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

MLLAMA_KERNEL(void, cast,
              (const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t size))

}  // namespace mllama::kernels
