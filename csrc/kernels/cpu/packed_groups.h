// What products with few rows and with many share.
#pragma once

#include "kernels/cpu/packed_linear.h"
#include "simd/bytes.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

constexpr int kVectors = kLanes / kWidth;  // registers that hold one number per lane of a block

// Whether x is multiplied as it is, in pairs of bf16.
constexpr bool takes_pairs([[maybe_unused]] const PackedLinear& a) {
#if defined(__AVX512BF16__)
    return a.packing == Packing::bf16 && a.dtype == Dtype::bf16;
#else
    return false;
#endif
}

// Whether x has so many rows that packed_gemm is faster. The same for all formats of codes, and for
// all of floats if x is f32: layers with the same input share activations. Up to 16 rows never, so
// that a row's bits do not depend on the rows beside it in a `decode_step`.
constexpr bool takes_panels(const PackedLinear& a) {
#if defined(__AVX512VNNI__)
    if (size_of(a.packing).quantized) return a.rows >= 32;
#endif
    return a.rows > (takes_pairs(a) ? 127 : 16);
}

constexpr int64_t kNibbles = kGroup / 2 * kLanes;  // bytes of a group's codes up to four bits

// What the codes of inputs 4 * step and on have beyond four bits, in place; `plane` is theirs.
template <int kBits>
vu upper_bits(const uint8_t* plane, int step) {
    constexpr int kMore = kBits - 4, kSteps = 8 / kMore;  // steps in a byte
    constexpr uint32_t kMask = 0x01010101u * (((1 << kMore) - 1) << 4);
    vu words = load_bits(plane + step / kSteps * kLanes * 4);
    int shift = step % kSteps * kMore - 4;
    return (shift < 0 ? words << -shift : words >> shift) & kMask;
}

}  // namespace
}  // namespace mllama::kernels::MLLAMA_ISA
