// How kernels read a block of packed weights: kLanes output rows, in groups of kGroup inputs.
#pragma once

#include "kernels/cpu/packed_linear.h"
#include "kernels/cuda/device.cuh"

namespace mllama::cuda {

using kernels::kGroup;
using kernels::kLanes;
using kernels::Packing;

MLLAMA_DEVICE uint32_t load_word(const uint8_t* p) { return *reinterpret_cast<const uint32_t*>(p); }
MLLAMA_DEVICE float load_f16(const uint8_t* p) {
    return to_float(*reinterpret_cast<const f16*>(p));
}

// One group, with the header that it shares.
template <Packing P>
struct PackedGroup {
    static constexpr kernels::PackingSize kSize = kernels::size_of(P);
    static constexpr bool kNested = kernels::is_nested(P), kHasMinimum = kernels::has_minimum(P);
    static constexpr bool kShifted = kHasMinimum && !kNested;
    static constexpr int kBits = kernels::bits_of(P);
    static constexpr uint32_t kCenter = kernels::center_of(P);
    static constexpr int kScaleBytes = kShifted ? 4 * kLanes : 2 * kLanes;
    static constexpr int kNibbleBytes = kGroup / 2 * kLanes;

    MLLAMA_DEVICE PackedGroup(const uint8_t* block, int64_t g) {
        int64_t before = g / kSize.span;
        header = block + before * (kSize.header + kSize.span * kSize.group);
        scales = block + (before + 1) * kSize.header + g * kSize.group;
        codes = scales + kScaleBytes;
    }

    // The codes of inputs 4 q ... 4 q + 3, as signed bytes.
    MLLAMA_DEVICE uint32_t word(int q, int row) const {
        if constexpr (kBits == 8) return load_word(codes + (q * kLanes + row) * 4);
        uint32_t low = load_word(codes + (q / 2 * kLanes + row) * 4) >> q % 2 * 4 & 0x0f0f0f0f;
        const uint8_t* more = codes + kNibbleBytes;
        if constexpr (kBits == 5) low |= (load_word(more + row * 4) >> q & 0x01010101) << 4;
        if constexpr (kBits == 6)
            low |= (load_word(more + (q / 4 * kLanes + row) * 4) >> q % 4 * 2 & 0x03030303) << 4;
        // The upper bits keep bytes from borrowing.
        if constexpr (kCenter > 0) low = ((low | 0x80808080) - kCenter * 0x01010101) ^ 0x80808080;
        return low;
    }
    // Of the inputs of either half of the group.
    MLLAMA_DEVICE float scale(int row, int half) const {
        if constexpr (kNested) return load_f16(header + 2 * row) * scales[row];
        if constexpr (P == Packing::q6_k) {
            int s = static_cast<int8_t>(scales[half * kLanes + row]);
            return load_f16(header + 2 * row) * static_cast<float>(s);
        }
        return load_f16(scales + 2 * row);
    }
    // Added to scale times code.
    MLLAMA_DEVICE float minimum(int row) const {
        if constexpr (kNested)
            return -load_f16(header + 2 * kLanes + 2 * row) * scales[kLanes + row];
        if constexpr (kShifted) return load_f16(scales + 2 * kLanes + 2 * row);
        return 0;
    }

    const uint8_t *header, *scales, *codes;
};

MLLAMA_DEVICE int code_of(uint32_t word, int i) {
    return static_cast<int8_t>(word >> 8 * i & 0xff);
}

// A group of weights that are floats of type W.
template <class W>
struct FloatGroup {
    MLLAMA_DEVICE FloatGroup(const uint8_t* block, int64_t g)
        : values(reinterpret_cast<const W*>(block) + g * kGroup * kLanes) {}
    MLLAMA_DEVICE float value(int k, int row) const {
        if constexpr (std::is_same_v<W, bf16>)
            return to_float(values[(k / 2 * kLanes + row) * 2 + k % 2]);
        return to_float(values[k * kLanes + row]);
    }
    // Inputs 2 p and 2 p + 1, of 16 bits.
    MLLAMA_DEVICE uint32_t pair(int p, int row) const {
        if constexpr (std::is_same_v<W, bf16>)
            return reinterpret_cast<const uint32_t*>(values)[p * kLanes + row];
        return values[2 * p * kLanes + row].bits |
               static_cast<uint32_t>(values[(2 * p + 1) * kLanes + row].bits) << 16;
    }

    const W* values;
};

// Calls run(std::integral_constant<Packing>) for a format of codes.
template <class Run>
void dispatch_codes(Packing packing, Run&& run) {
    auto call = [&]<Packing P>() { run(std::integral_constant<Packing, P>{}); };
    switch (packing) {
        case Packing::int8: return call.template operator()<Packing::int8>();
        case Packing::int4: return call.template operator()<Packing::int4>();
        case Packing::q4_0: return call.template operator()<Packing::q4_0>();
        case Packing::q4_1: return call.template operator()<Packing::q4_1>();
        case Packing::q5_0: return call.template operator()<Packing::q5_0>();
        case Packing::q5_1: return call.template operator()<Packing::q5_1>();
        case Packing::q4_k: return call.template operator()<Packing::q4_k>();
        case Packing::q5_k: return call.template operator()<Packing::q5_k>();
        case Packing::q6_k: return call.template operator()<Packing::q6_k>();
        default: return;
    }
}
// Calls run(W{}) for a format of floats.
template <class Run>
void dispatch_floats(Packing packing, Run&& run) {
    switch (packing) {
        case Packing::f32: return run(float{});
        case Packing::bf16: return run(bf16{});
        case Packing::f16: return run(f16{});
        default: return;
    }
}

}  // namespace mllama::cuda
