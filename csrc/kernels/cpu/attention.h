// softmax(q k' * scale + added) v, and its gradients, for H query heads that share KV key heads.
//
// A group is one key head of one batch row with the query heads that share it; they are handled
// together, so that K and V are read once. Row r of a group is query r / group_size of head kv_head
// * group_size + r % group_size. Scores are kept in log2 units, so that the exponential is a plain
// 2^x.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd/isa.h"
#include "simd/types.h"

namespace mllama::kernels {

// A [batch, length, heads, size] tensor; strides in elements, that of the last dimension is 1.
struct Heads {
    const void* data;
    int64_t batch, length, head;
};

struct KeyRange {
    int32_t first, last;  // last is exclusive
};

// The keys visible to the queries of one batch row: keys [start(t), limit(t)) to query t, without
// those whose `added` is -inf.
struct VisibleKeys {
    int64_t offset;        // position of query 0: keys up to t + offset are visible; at least
                           // `last` if not causal
    int64_t window_start;  // and keys from t + window_start on, unless it is in the prefix
    int64_t prefix;        // leading keys, all visible to queries among them
    int64_t first, last;   // no key outside is visible to any query
    const float* added;    // [keys], in log2 units, to every score of a key; null = 0
    // [queries], within first and last, if queries differ in more than offset and prefix;
    // else null.
    const KeyRange* ranges;

    // Written out: with std::clamp, or a function in its place, GCC 12 makes the decode kernel's
    // loops a third slower in bf16.
    int64_t start(int64_t t) const {
        if (ranges) return ranges[t].first;
        int64_t key = t + offset < prefix ? first : t + window_start;
        return key < first ? first : key < last ? key : last;
    }
    int64_t limit(int64_t t) const {
        if (ranges) return ranges[t].last;
        int64_t keys = t + offset + 1 > prefix ? t + offset + 1 : prefix;
        return keys < first ? first : keys < last ? keys : last;
    }
};

struct Attention {
    Dtype dtype;
    int64_t batch, queries, keys, heads, kv_heads, size;
    float scale;
    float softcap;  // scores become softcap * tanh(score / softcap); 0 = none
    Heads q, k, v;
    const VisibleKeys* visible;  // [batch]

    int64_t group_size() const { return heads / kv_heads; }
    int64_t groups() const { return batch * kv_heads; }
    int64_t rows() const { return queries * group_size(); }  // of a group
};

// Turns a query's scores into probabilities: 2^(score - highest) / sum. Two numbers, because in
// highest + log2(sum) the logarithm would be lost with scores of -1e9, as mask biases give.
struct Statistic {
    float highest, sum;  // -inf and 0 if no key is visible
};

struct AttentionForward : Attention {
    // For attention_decode: k and v are rows of quantized_rows.h, their strides in bytes; dtype,
    // that of q and out, is f32.
    bool quantized;
    void* out;                    // [batch, queries, heads, size]
    Statistic* statistics;        // [batch, heads, queries]
    int64_t first_chunk, chunks;  // for attention_decode: the chunks of keys visible to any query
};

struct AttentionBackward : Attention {
    Heads grad_out;
    const void* out;  // as AttentionForward's
    const Statistic* statistics;
    void *grad_q, *grad_k, *grad_v;  // contiguous
    int64_t parts;                   // number of partial sums per group's grad_k and grad_v
    float* partial;                  // [groups, parts, attention_sums]; unused for one part
};

constexpr int64_t kMostTileRows = 48;  // maximum rows of a group that a kernel processes at once

// Many queries: blocks of scores on packed copies of q, k and v. Task = (group, share): a share
// takes every shares-th tile of the group's rows.
MLLAMA_KERNEL(void, attention_prefill,
              (const AttentionForward& args, int64_t shares, int64_t first_task, int64_t last_task))

// Few queries, without ranges: k and v are read in place, once, in chunks of keys whose results are
// merged afterwards. Task = (group, chunk); `partial` is [groups, chunks, attention_chunk_size].
constexpr int64_t kDecodeChunk = 256;
inline int64_t attention_chunk_size(const Attention& a) { return a.rows() * (a.size + 2); }
MLLAMA_KERNEL(void, attention_decode,
              (const AttentionForward& args, float* partial, int64_t first_task, int64_t last_task))
MLLAMA_KERNEL(void, attention_merge,
              (const AttentionForward& args, const float* partial, int64_t first_group,
               int64_t last_group))

// Gradients. Task = (group, part): a part takes every parts-th tile of the group's rows. With more
// than one part, attention_backward_sum follows over the groups.
inline int64_t attention_sums(const Attention& a) {
    return 2 * (a.keys + 8) * ((a.size + 15) / 16 * 16);
}
MLLAMA_KERNEL(void, attention_backward,
              (const AttentionBackward& args, int64_t first_task, int64_t last_task))
MLLAMA_KERNEL(void, attention_backward_sum,
              (const AttentionBackward& args, int64_t first_group, int64_t last_group))

}  // namespace mllama::kernels
