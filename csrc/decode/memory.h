// The buffers of a decoding step.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>

#include "decode/decoder.h"

namespace mllama {

inline int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// The buffers of a step, in one piece of memory. All but the last three are [rows, width].
struct Memory {
    Memory(const Decoder& d, int64_t rows, int64_t chunks) {
        int64_t heads = d.heads * d.head_dim, kv = d.kv_heads * d.head_dim;
        int64_t widest = std::max({d.hidden, heads, d.intermediate});
        int64_t groups = kernels::group_count(widest), padded = groups * kernels::kGroup;
        float *codes, *sums;
        const std::pair<float**, int64_t> parts[] = {
            {&normed, d.hidden},
            {&out, d.hidden},
            {&q, heads},
            {&k, kv},
            {&v, kv},
            {&query, heads},
            {&attended, heads},
            {&gate, d.intermediate},
            {&up, d.intermediate},
            {&rstd, d.heads},
            {&small, d.ranks},
            {&activations.values, padded},
            {&activations.scales, groups},
            {&activations.totals, groups},
            {&codes, padded / 4},
            {&sums, groups},
            {&partial, chunks * d.heads * (d.head_dim + 2)},
        };
        int64_t size = 16;
        for (auto& [part, width] : parts) size += whole_lines(rows * width);
        all.reset(new float[size]);
        float* at = all.get() + (64 - reinterpret_cast<uintptr_t>(all.get()) % 64) % 64 / 4;
        for (auto& [part, width] : parts) *part = at, at += whole_lines(rows * width);
        activations.codes = reinterpret_cast<int8_t*>(codes);
        activations.sums = reinterpret_cast<int16_t*>(sums);
    }

    std::unique_ptr<float[]> all;
    float *normed, *out, *q, *k, *v, *gate, *up, *rstd, *small, *partial;
    float *query, *attended;  // of the cache's dtype
    kernels::Activations activations;
};

}  // namespace mllama
