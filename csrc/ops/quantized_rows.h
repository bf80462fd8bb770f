// quantize_rows and dequantize_rows: schemas and checks, the same on every device.
#pragma once

#include "core/rows.h"
#include "kernels/cpu/quantized_rows.h"

namespace mllama {

constexpr char kQuantizeRowsSchema[] = "quantize_rows(Tensor x) -> Tensor";
constexpr char kDequantizeRowsSchema[] =
    "dequantize_rows(Tensor codes, int size, ScalarType dtype) -> Tensor";

inline void check_rows(const char* op, const Tensor& codes, int64_t size) {
    check(codes.dim() >= 1 && codes.scalar_type() == ScalarType::Char, op, "codes");
    check(size >= 0 && size <= last_size(codes) &&
              kernels::quantized_row_bytes(size) == last_size(codes),
          op, "size");
}

// Results: rows of codes for x, and rows of `size` values for codes.
inline Tensor new_codes(const Tensor& x) {
    return new_tensor(x, with_last(x, kernels::quantized_row_bytes(last_size(x))),
                      aoti_torch_dtype_int8());
}
inline Tensor new_values(const Tensor& codes, int64_t size, ScalarType type) {
    return new_tensor(codes, with_last(codes, size), static_cast<int32_t>(type));
}

}  // namespace mllama
