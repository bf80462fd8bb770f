#include "core/launcher.h"
#include "kernels/cuda/quantized_rows.h"
#include "ops/quantized_rows.h"

namespace mllama {
namespace {

Tensor quantize_rows(const Tensor& x_) {
    const char* op = "quantize_rows";
    Dtype dtype = dtype_of(op, "x", x_);
    check(x_.dim() >= 1, op, "x");
    Tensor x = dense(x_), codes = new_codes(x);
    Launcher launcher(op, x);
    launcher.reads("x", x);
    launcher.writes("codes", codes);
    cuda::quantize_rows(x.const_data_ptr(), dtype, mutable_data<int8_t>(codes), row_count(x),
                        last_size(x), launcher.stream());
    launcher.done();
    return codes;
}

Tensor dequantize_rows(const Tensor& codes_, int64_t size, ScalarType type) {
    const char* op = "dequantize_rows";
    check_rows(op, codes_, size);
    Dtype dtype = dtype_of(op, "dtype", type);
    Tensor codes = dense(codes_);
    Tensor x = new_values(codes, size, type);
    Launcher launcher(op, codes);
    launcher.reads("codes", codes);
    launcher.writes("x", x);
    cuda::dequantize_rows(data<int8_t>(codes), x.mutable_data_ptr(), dtype, row_count(codes), size,
                          launcher.stream());
    launcher.done();
    return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) {
    implement(m, "quantize_rows", TORCH_BOX(&quantize_rows));
    implement(m, "dequantize_rows", TORCH_BOX(&dequantize_rows));
}

}  // namespace mllama
