// A decoder whose linear layers are packed, as `decode_step` runs it: one or a few new positions in
// each row of a batch, through all layers, on a key-value cache.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/tensor.h"
#include "kernels/cpu/gated.h"
#include "kernels/cpu/packed_linear.h"

namespace mllama {

// A low-rank update beside a packed weight.
struct DecoderAdapter {
    int64_t rank;
    Dtype a_dtype, b_dtype;
    const void *a, *b;  // [rank, in] and [out, rank]
    float scale;
};

struct DecoderLinear {
    kernels::Packing packing;
    int64_t in, out;
    const uint8_t* weight;  // packed
    const float* bias;      // [out] or null
    std::optional<DecoderAdapter> adapter;

    int64_t rank() const { return adapter ? adapter->rank : 0; }
    int64_t block_bytes() const { return kernels::block_bytes(packing, in); }
};

using DecoderNorm = const float*;  // weight; null = no norm

// k and v of a layer that attends to images are the cache's: its projections of them are not here.
struct DecoderLayer {
    bool cross;  // attends to images in place of text
    DecoderNorm input, post_attention, pre_feedforward, post_feedforward, q_norm, k_norm;
    DecoderLinear q, k, v, o, gate, up, down;
    int64_t rope;    // which of the decoder's frequencies
    int64_t window;  // positions that one sees; 0 = all
    float scale, softcap;
    float attention_gate, mlp_gate;  // what a cross-attention layer's halves are scaled by
};

struct Decoder {
    int64_t hidden, heads, kv_heads, head_dim, intermediate;
    int64_t ranks;  // of the adapters of layers with the same input, together: the most there are
    kernels::Activation activation;
    float eps, norm_offset;
    std::vector<DecoderLayer> layers;
    DecoderNorm norm;
    std::vector<const float*> frequencies;  // [head_dim / 2] each, of rotary positions
    std::vector<Tensor> tensors;            // what all pointers point into
    int32_t device;                         // a CUDA device's index; -1: the CPU
};

// What a step reads and writes beside the decoder.
struct DecodeStep {
    int64_t batch, queries;          // new positions of each row of the batch
    Tensor hidden;                   // float32 [batch, queries, hidden]: embeddings, overwritten
    std::vector<int64_t> positions;  // [batch, queries], that rotate q and k
    // [batch, kv_heads, capacity, head_dim], per layer: text's or images'. Quantized: int8 rows of
    // quantized_rows.h in place of head_dim values of cache_dtype.
    std::vector<Tensor> keys, values;
    bool quantized;
    Dtype cache_dtype;               // of queries and attention's results; f32 if quantized
    int64_t length;                  // positions before the new ones
    std::vector<int64_t> first_key;  // [batch]: padding before them
    // Of images: how many keys there are (without them those layers do nothing), what is added to a
    // key's scores, [batch, image_keys] in log2 units or null, and whether a position sees any,
    // [batch, queries].
    int64_t image_keys;
    const float* image_bias;
    std::vector<bool> sees_image;
    Tensor out;  // float32 [batch, queries, hidden]: after the last norm

    // Of products: the positions of row 0, then those of row 1, and so on.
    int64_t rows() const { return batch * queries; }
};

void run_step(const Decoder& decoder, const DecodeStep& step);

}  // namespace mllama
