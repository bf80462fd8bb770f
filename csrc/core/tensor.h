// The names operators use for torch's stable tensors: the files in core/ are the only ones that
// change with torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/library.h"
#include "simd/types.h"

namespace mllama {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// The kernels' name for a tensor's dtype; refuses what they have no loop for.
inline Dtype dtype_of(const char* op, const char* name, ScalarType type) {
    switch (type) {
        case ScalarType::Float: return Dtype::f32;
        case ScalarType::BFloat16: return Dtype::bf16;
        case ScalarType::Half: return Dtype::f16;
        default: check(false, op, name);
    }
    return Dtype::f32;
}
inline Dtype dtype_of(const char* op, const char* name, const Tensor& t) {
    return dtype_of(op, name, t.scalar_type());
}

inline Tensor dense(const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
// The last dimension dense; other strides as they are.
inline Tensor last_dense(const Tensor& t) {
    int64_t last = t.dim() - 1;
    return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}
inline Tensor to_dtype(const Tensor& t, ScalarType type) {
    return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// y = x weight^T + bias: torch's matrix product. The bias may be a matrix, also y itself.
inline void linear_out(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Tensor& y) {
    using torch::stable::detail::from;
    std::array<StableIValue, 4> stack{from(x), from(weight), from(bias), from(y)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes the reference that the call returned
}

// y = a b: torch's matrix product.
inline void matmul_out(const Tensor& a, const Tensor& b, const Tensor& y) {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(a), from(b), from(y)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
}

// Fresh contiguous memory on like's device. Through the C shim: torch::stable::new_empty goes
// through the dispatcher by the operator's name and takes twice as long (1.4 us against 0.6), which
// short calls feel.
inline Tensor new_tensor(const Tensor& like, Sizes sizes,
                         std::optional<int32_t> dtype = std::nullopt) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1))
        strides[i] = stride;
    int32_t own_dtype, device, index;
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &own_dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 dtype.value_or(own_dtype), device, index, &handle));
    return Tensor(handle);
}
inline Tensor new_like(const Tensor& like) { return new_tensor(like, like.sizes()); }
inline Tensor new_float(const Tensor& like, Sizes sizes) {
    return new_tensor(like, sizes, aoti_torch_dtype_float32());
}

// A contiguous tensor's memory as [rows, columns]; through the shim for the same reason.
inline Tensor as_matrix(const Tensor& t, int64_t rows, int64_t columns) {
    std::array<int64_t, 2> sizes{rows, columns}, strides{columns, 1};
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(  // 0 is added to t's own offset
        aoti_torch__reinterpret_tensor(t.get(), 2, sizes.data(), strides.data(), 0, &handle));
    return Tensor(handle);
}

template <class T>
const T* data(const Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace mllama
