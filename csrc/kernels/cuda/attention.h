// Launchers of attention and its gradients, with groups of rows as in kernels/cpu/attention.h.
#pragma once

#include <cstdint>

#include "kernels/cpu/attention.h"
#include "kernels/cuda/stream.h"

namespace mllama::cuda {

// A tensor of numbers per batch row, query or key: row b begins at data + b * stride.
template <class T>
struct Mask {
    const T* data;  // null: none
    int64_t stride;
};

// The operator's masks as they are on the device.
struct Masks {
    Mask<bool> key_mask;
    Mask<float> key_bias;
    Mask<int64_t> query_offset, prefix_length, first_key;
    bool prefix_per_query, first_key_per_query;
    bool causal;
    int64_t window;  // 0 = none
};

struct Attention {
    Dtype dtype;
    int64_t batch;
    int queries, keys, heads, kv_heads, size;
    int group_size, rows;  // of a group: heads / kv_heads, and queries * group_size
    float scale;
    float softcap;  // 0 = none
    kernels::Heads q, k, v;
    bool aligned;  // rows of q, k, v and grad_out can be copied in pieces of 16 bytes
    Masks masks;
};

struct AttentionForward : Attention {
    void* out;                       // [batch, queries, heads, size]
    kernels::Statistic* statistics;  // [batch, heads, queries]
    int parts;                       // of the keys
    int part_keys;                   // of a part; 0: what is visible is shared out
    float* partial;                  // [groups, rows, parts, size + 2], unless there is one part
};

struct AttentionBackward : Attention {
    kernels::Heads grad_out;
    const void* out;
    const kernels::Statistic* statistics;
    float* deltas;                   // [batch, heads, queries]
    void *grad_q, *grad_k, *grad_v;  // contiguous
};

// How many parts of the keys have blocks of their own. Depends on sizes alone, as bits do.
int attention_parts(const Attention& args);
void attention(const AttentionForward& args, Stream stream);

// Few queries on a cache whose length is on the device: masks have it as the query_offset, and
// `keys` are the cache's room. What a query gets does not depend on the others, nor on that room up
// to kMostParts parts of kDecodePart keys. `out` is float32; there are no statistics. Quantized: k
// and v are rows of quantized_rows.h, their strides in bytes, and q is float32.
constexpr int kDecodePart = 256, kMostParts = 128;
int decode_part_keys(int64_t keys);
void attention_decode(const AttentionForward& args, bool quantized, Stream stream);

void attention_backward(const AttentionBackward& args, Stream stream);

}  // namespace mllama::cuda
