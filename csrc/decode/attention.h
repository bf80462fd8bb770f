// What a layer's attention reads in a step.
#pragma once

#include <algorithm>
#include <vector>

#include "decode/decoder.h"
#include "decode/memory.h"
#include "kernels/cpu/attention.h"

namespace mllama {

// The keys that the new positions of each row of the batch see in a layer.
inline std::vector<kernels::VisibleKeys> visible_keys(const DecoderLayer& layer,
                                                      const DecodeStep& s) {
    std::vector<kernels::VisibleKeys> rows;
    for (int64_t row = 0; row < s.batch; ++row) {
        if (layer.cross) {
            rows.push_back({.offset = s.image_keys,
                            .window_start = -s.queries,
                            .prefix = 0,
                            .first = 0,
                            .last = s.image_keys,
                            .added = s.image_bias ? s.image_bias + row * s.image_keys : nullptr,
                            .ranges = nullptr});
            continue;
        }
        int64_t start = layer.window ? s.length + 1 - layer.window : -s.queries;
        rows.push_back({.offset = s.length,
                        .window_start = start,
                        .prefix = 0,
                        .first = std::max(s.first_key[row], start),
                        .last = s.length + s.queries,
                        .added = nullptr,
                        .ranges = nullptr});
    }
    return rows;
}

// The kernel's arguments for layer i. They point to `visible`, the layer's, and to `statistics`.
// Empty for a layer that attends to images if there are none.
inline kernels::AttentionForward attention_arguments(
    const Decoder& d, const DecodeStep& s, size_t i, const Memory& memory,
    const std::vector<kernels::VisibleKeys>& visible, kernels::Statistic* statistics) {
    const DecoderLayer& layer = d.layers[i];
    if (layer.cross && !s.image_keys) return {};
    int64_t size = d.head_dim, length = s.keys[i].size(3);  // of a cached row
    int64_t head = s.keys[i].size(2) * length, row = d.kv_heads * head;
    int64_t keys = layer.cross ? s.image_keys : s.length + s.queries, first = keys;
    for (const kernels::VisibleKeys& one : visible) first = std::min(first, one.first);
    kernels::AttentionForward a{};
    a.dtype = s.cache_dtype, a.quantized = s.quantized;
    a.batch = s.batch, a.queries = s.queries, a.keys = keys;
    a.heads = d.heads, a.kv_heads = d.kv_heads, a.size = size;
    a.scale = layer.scale, a.softcap = layer.softcap;
    a.q = {memory.query, s.queries * d.heads * size, d.heads * size, size};
    a.k = {s.keys[i].const_data_ptr(), row, length, head};
    a.v = {s.values[i].const_data_ptr(), row, length, head};
    a.visible = visible.data();
    a.out = memory.attended;
    a.statistics = statistics;
    a.first_chunk = first / kernels::kDecodeChunk;
    a.chunks = (keys - 1) / kernels::kDecodeChunk + 1 - a.first_chunk;
    return a;
}

}  // namespace mllama
