#include "kernels/cuda/quantized_rows.cuh"

#include "kernels/cuda/quantized_rows.h"

namespace mllama::cuda {

void quantize_rows(const void* x, Dtype dtype, int8_t* codes, int64_t rows, int64_t size,
                   Stream stream) {
    int64_t groups = (size + kernels::kRowGroup - 1) / kernels::kRowGroup;
    dispatch(dtype, [&](auto t) {
        using T = decltype(t);
        launch("quantize_rows", &quantize_rows<T>, blocks_for(rows * groups, kQuantizeWarps),
               32 * kQuantizeWarps, 0, stream, static_cast<const T*>(x), codes, rows, size,
               kernels::quantized_row_bytes(size));
    });
}

void dequantize_rows(const int8_t* codes, void* x, Dtype dtype, int64_t rows, int64_t size,
                     Stream stream) {
    dispatch(dtype, [&](auto t) {
        using T = decltype(t);
        launch("dequantize_rows", &dequantize_rows<T>, blocks_for(rows * size, 32 * kQuantizeWarps),
               32 * kQuantizeWarps, 0, stream, codes, static_cast<T*>(x), rows, size,
               kernels::quantized_row_bytes(size));
    });
}

}  // namespace mllama::cuda
