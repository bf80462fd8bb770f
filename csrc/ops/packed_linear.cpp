#include "ops/packed_linear.h"

#include <atomic>
#include <cstring>
#include <memory>

#include "core/pages.h"
#include "core/threads.h"
#include "kernels/cpu/pack_gguf.h"
#include "ops/frozen_weight.h"
#include "ops/unpack_cpu.h"

namespace mllama {
namespace {

constexpr int64_t kBytesGrain = 65536;  // of weights that a thread reads at least

// Memory for a call's activations. Beside codes, `values` is used on some instruction sets alone;
// what is not touched costs nothing.
struct Workspace {
    Workspace(kernels::Packing packing, int64_t rows, int64_t in) {
        int64_t groups = rows * kernels::group_count(in), values = groups * kernels::kGroup;
        bool codes = kernels::size_of(packing).quantized;
        memory.reset(new float[values + (codes ? values / 4 + 3 * groups : 0)]);
        activations.values = memory.get();
        activations.scales = memory.get() + values;
        activations.sums = reinterpret_cast<int16_t*>(activations.scales + groups);
        activations.totals = activations.scales + 2 * groups;
        activations.codes = reinterpret_cast<int8_t*>(activations.totals + groups);
    }
    std::unique_ptr<float[]> memory;
    kernels::Activations activations;
};

Tensor packed_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t out,
                     int64_t packing, int64_t activation) {
    PackedLinearArgs a("packed_linear", x, weight, bias, out, packing, activation);
    if (a.y.numel() == 0) return a.y;
    int64_t rows = row_count(a.x), in = last_size(a.x);
    Workspace workspace(a.packing, rows, in);
    kernels::PackedLinear args = a.kernel(workspace.activations);
    auto prepare = MLLAMA_CALL(packed_activations);
    auto multiply = MLLAMA_CALL(packed_product);
    parallel_for(rows, row_grain(in),
                 [&](int64_t begin, int64_t end) { prepare(args, begin, end); });
    int64_t bytes = (kernels::block_bytes(a.packing, in) + 1) * (1 + rows / 4);
    parallel_for(kernels::block_count(out), std::max<int64_t>(kBytesGrain / bytes, 1),
                 [&](int64_t begin, int64_t end) { multiply(args, begin, end); });
    return a.y;
}

Tensor pack_weight(const Tensor& weight, int64_t packing_) {
    const char* op = "pack_weight";
    kernels::Packing packing = packing_of(op, packing_);
    Dtype dtype = dtype_of(op, "weight", weight);
    check(weight.dim() == 2, op, "weight");
    int64_t out = weight.size(0), in = weight.size(1), blocks = kernels::block_count(out);
    Tensor source = dense(weight),
           packed = new_tensor(weight, {blocks * kernels::block_bytes(packing, in)},
                               aoti_torch_dtype_uint8());
    advise_huge_pages(packed);
    kernels::PackWeight args{.packing = packing,
                             .dtype = dtype,
                             .in = in,
                             .out = out,
                             .first = 0,
                             .width = in,
                             .dense = const_cast<void*>(source.const_data_ptr()),
                             .packed = mutable_data<uint8_t>(packed)};
    auto pack = MLLAMA_CALL(pack_weight);
    std::atomic<bool> finite = true;
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
        if (!pack(args, begin, end)) finite = false;
    });
    check(finite, op, "weight: it has values that the format cannot hold");
    return packed;
}

// The lanes after the last row are zeros.
Tensor pack_gguf(const Tensor& blocks, int64_t packing_) {
    const char* op = "pack_gguf";
    kernels::Packing packing = packing_of(op, packing_);
    kernels::GgufBlock block = kernels::gguf_block(packing);
    check(block.bytes > 0, op, "packing");
    check(blocks.dim() == 2 && blocks.scalar_type() == ScalarType::Byte &&
              blocks.size(1) % block.bytes == 0,
          op, "blocks");
    int64_t out = blocks.size(0), in = blocks.size(1) / block.bytes * block.inputs;
    check(out <= kMostFeatures && in <= kMostFeatures, op, "blocks");
    int64_t count = kernels::block_count(out), bytes = kernels::block_bytes(packing, in);
    Tensor source = dense(blocks), packed = new_tensor(blocks, {count * bytes});
    advise_huge_pages(packed);
    auto* to = mutable_data<uint8_t>(packed);
    kernels::PackGguf args{
        .packing = packing, .in = in, .out = out, .blocks = data<uint8_t>(source), .packed = to};
    auto pack = MLLAMA_CALL(pack_gguf);
    std::atomic<bool> finite = true;
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
        if (end == count) std::memset(to + (count - 1) * bytes, 0, bytes);
        if (!pack(args, begin, end)) finite = false;
    });
    check(finite, op, "blocks: they have scales that are not finite");
    return packed;
}

Tensor unpack_weight(const Tensor& weight, const MaybeTensor& rows, int64_t out, int64_t width,
                     int64_t packing, ScalarType type) {
    const char* op = "unpack_weight";
    UnpackWeightArgs a(op, weight, rows, out, width, packing, type);
    kernels::PackWeight args = a.kernel();
    if (!a.rows) {
        UnpackOnCpu::unpack(args, 0, kernels::block_count(out));
        return a.dense_rows;
    }
    const int64_t* indices = data<int64_t>(*a.rows);
    int64_t count = a.rows->numel();
    for (int64_t i = 0; i < count; ++i) check(0 <= indices[i] && indices[i] < out, op, "rows");
    auto unpack = MLLAMA_CALL(unpack_row);
    parallel_for(count, row_grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) unpack(args, indices[i], i);
    });
    return a.dense_rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    define(m, kPackedLinearSchema);
    define(m, kPackWeightSchema);
    define(m, kPackGgufSchema);
    define(m, kUnpackWeightSchema);
    define(m, kDequantizedLinearSchema);
    define(m, kDequantizedLinearBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "packed_linear", TORCH_BOX(&packed_linear));
    implement(m, "pack_weight", TORCH_BOX(&pack_weight));
    implement(m, "pack_gguf", TORCH_BOX(&pack_gguf));
    implement(m, "unpack_weight", TORCH_BOX(&unpack_weight));
    implement(m, "dequantized_linear", TORCH_BOX(&DequantizedLinear<UnpackOnCpu>::forward));
    implement(m, "_dequantized_linear_backward",
              TORCH_BOX(&DequantizedLinear<UnpackOnCpu>::backward));
}

}  // namespace mllama
