// The names operators use for torch's stable tensors: the files in core/ are the only ones that change with torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "simd/types.h"

namespace mllama {

using torch::headeronly::ScalarType;
using torch::stable::empty_like;
using torch::stable::new_empty;
using torch::stable::Tensor;

// The kernels' name for a tensor's dtype; refuses what they have no loop for.
inline Dtype dtype_of(const char* op, const char* name, const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return Dtype::f32;
        case ScalarType::BFloat16: return Dtype::bf16;
        case ScalarType::Half: return Dtype::f16;
        default: check_value(false, op, ": ", name, " must be float32, bfloat16 or float16");
    }
    return Dtype::f32;
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Tensor to_dtype(const Tensor& t, ScalarType type) {
    return t.scalar_type() == type ? t : torch::stable::to(t, type);
}
inline Tensor new_float(const Tensor& like, const std::vector<int64_t>& sizes) {
    return new_empty(like, sizes, ScalarType::Float);
}

template <class T>
const T* data(const Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
}

// Runs body(begin, end) over [0, size) on torch's threads, in pieces of at least `grain`.
template <class Body>
void parallel_for(int64_t size, int64_t grain, Body&& body) {
    if (size <= grain) {  // no parallel region for little work
        if (size > 0) body(int64_t{0}, size);
        return;
    }
    torch::stable::parallel_for(0, size, grain, body);
}

}  // namespace mllama
