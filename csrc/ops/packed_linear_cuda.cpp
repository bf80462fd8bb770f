#include "core/launcher.h"
#include "kernels/cuda/packed_linear.h"
#include "ops/frozen_weight.h"
#include "ops/packed_linear.h"
#include "ops/unpack_cuda.h"

namespace mllama {
namespace {

Tensor packed_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t out,
                     int64_t packing, int64_t activation) {
    const char* op = "packed_linear";
    PackedLinearArgs a(op, x, UnpackOnCuda::readable(weight), bias, out, packing, activation);
    if (a.y.numel() == 0) return a.y;
    Launcher launcher(op, a.x);
    launcher.reads("x", a.x);
    launcher.reads("weight", a.weight);
    launcher.writes("y", a.y);
    if (a.bias) launcher.reads("bias", *a.bias);
    kernels::Activations activations{};
    Tensor codes, scales, sums;
    bool quantized = kernels::size_of(a.packing).quantized;
    if (quantized) {
        int64_t rows = row_count(a.x), chunks = cuda::chunk_count(last_size(a.x));
        codes = new_tensor(a.x, {rows, chunks * cuda::kChunkInputs}, aoti_torch_dtype_int8());
        scales = new_float(a.x, {rows, chunks * cuda::kChunkGroups});
        sums = new_float(a.x, {rows, chunks * cuda::kChunkGroups});
        activations.values = mutable_data<float>(sums);
        activations.codes = mutable_data<int8_t>(codes);
        activations.scales = mutable_data<float>(scales);
        launcher.writes("codes", codes);
        launcher.writes("scales", scales);
        launcher.writes("sums", sums);
    }
    kernels::PackedLinear args = a.kernel(activations);
    if (quantized) cuda::quantize_activations(args, launcher.stream());
    cuda::packed_linear(args, launcher.stream());
    launcher.done();
    return a.y;
}

// Indices are checked where they are, in the kernel: reading them here would wait for the device.
Tensor unpack_weight(const Tensor& weight, const MaybeTensor& rows, int64_t out, int64_t width,
                     int64_t packing, ScalarType dtype) {
    const char* op = "unpack_weight";
    UnpackWeightArgs a(op, UnpackOnCuda::readable(weight), rows, out, width, packing, dtype);
    Launcher launcher(op, a.weight);
    launcher.reads("weight", a.weight);
    launcher.writes("dense", a.dense_rows);
    if (a.rows) launcher.reads("rows", *a.rows);
    cuda::unpack_weight(a.kernel(), a.rows ? data<int64_t>(*a.rows) : nullptr, a.dense_rows.size(0),
                        launcher.stream());
    launcher.done();
    return a.dense_rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) {
    implement(m, "packed_linear", TORCH_BOX(&packed_linear));
    implement(m, "unpack_weight", TORCH_BOX(&unpack_weight));
    implement(m, "dequantized_linear", TORCH_BOX(&DequantizedLinear<UnpackOnCuda>::forward));
    implement(m, "_dequantized_linear_backward",
              TORCH_BOX(&DequantizedLinear<UnpackOnCuda>::backward));
}

}  // namespace mllama
