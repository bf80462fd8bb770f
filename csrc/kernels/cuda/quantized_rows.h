// Launchers of quantize_rows and dequantize_rows; arguments as those of the CPU's kernels.
#pragma once

#include "kernels/cpu/quantized_rows.h"
#include "kernels/cuda/stream.h"

namespace mllama::cuda {

void quantize_rows(const void* x, Dtype dtype, int8_t* codes, int64_t rows, int64_t size,
                   Stream stream);
void dequantize_rows(const int8_t* codes, void* x, Dtype dtype, int64_t rows, int64_t size,
                     Stream stream);

}  // namespace mllama::cuda
