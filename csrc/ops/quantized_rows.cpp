#include "ops/quantized_rows.h"

#include "core/threads.h"

namespace mllama {
namespace {

Tensor quantize_rows(const Tensor& x_) {
    const char* op = "quantize_rows";
    Dtype dtype = dtype_of(op, "x", x_);
    check(x_.dim() >= 1, op, "x");
    Tensor x = dense(x_);
    Tensor codes = new_codes(x);
    int64_t size = last_size(x), bytes = last_size(codes);
    auto quantize = MLLAMA_CALL(quantize_rows);
    parallel_for(row_count(x), row_grain(size), [&](int64_t begin, int64_t end) {
        quantize(static_cast<const char*>(x.const_data_ptr()) + begin * size * size_of(dtype),
                 dtype, mutable_data<int8_t>(codes) + begin * bytes, end - begin, size);
    });
    return codes;
}

Tensor dequantize_rows(const Tensor& codes_, int64_t size, ScalarType type) {
    const char* op = "dequantize_rows";
    check_rows(op, codes_, size);
    Dtype dtype = dtype_of(op, "dtype", type);
    Tensor codes = dense(codes_);
    Tensor x = new_values(codes, size, type);
    int64_t bytes = last_size(codes);
    auto dequantize = MLLAMA_CALL(dequantize_rows);
    parallel_for(row_count(codes), row_grain(size), [&](int64_t begin, int64_t end) {
        dequantize(data<int8_t>(codes) + begin * bytes,
                   static_cast<char*>(x.mutable_data_ptr()) + begin * size * size_of(dtype), dtype,
                   end - begin, size);
    });
    return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    define(m, kQuantizeRowsSchema);
    define(m, kDequantizeRowsSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "quantize_rows", TORCH_BOX(&quantize_rows));
    implement(m, "dequantize_rows", TORCH_BOX(&dequantize_rows));
}

}  // namespace mllama
