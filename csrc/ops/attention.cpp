#include "ops/attention.h"

#include <limits>
#include <memory>

#include "core/threads.h"
#include "kernels/cpu/attention.h"

namespace mllama {
namespace {

// Groups of up to this many rows go to the decode kernel, which does not pack; above, packing pays
// off (measured).
constexpr int64_t kDecodeRows = 24;

// Row b of a mask's tensor.
template <class T>
const T* mask_row(const MaybeTensor& t, int64_t b) {
    if (!t) return nullptr;
    int64_t width = t->dim() == 2 ? t->size(1) : 1;
    return data<T>(*t) + (t->dim() == 0 || t->size(0) == 1 ? 0 : b * width);
}

// The keys visible to each batch row's queries, read from the masks in CPU memory.
class Visible {
  public:
    explicit Visible(const AttentionArgs& a) : rows_(a.q.size(0)) {
        const AttentionOptions& o = a.options;
        const int64_t batch = a.q.size(0), queries = a.q.size(1), keys = a.k.size(1);
        const bool per_query = o.prefix_length && o.prefix_length->dim() == 2;
        if (o.key_mask || o.key_bias) added_.reset(new float[batch * keys]);
        for (int64_t b = 0; b < batch; ++b) {
            kernels::VisibleKeys& row = rows_[b];
            row = causal_row(o, b, queries, keys);
            if (added_) {
                add(row, added_.get() + b * keys, mask_row<bool>(o.key_mask, b),
                    mask_row<float>(o.key_bias, b), keys);
            }
            const int64_t* starts = mask_row<int64_t>(o.first_key, b);
            // Starts that hide nothing are treated as none, so that a graph compiled for both gives
            // the same result.
            if (per_query || std::any_of(starts, starts + (starts ? queries : 0),
                                         [](int64_t key) { return key > 0; })) {
                if (!ranges_) ranges_.reset(new kernels::KeyRange[batch * queries]);
                limit(row, ranges_.get() + b * queries, starts,
                      per_query ? mask_row<int64_t>(o.prefix_length, b) : nullptr, queries);
            }
            tighten(row, queries);
        }
    }
    const kernels::VisibleKeys* rows() const { return rows_.data(); }
    bool ranges() const { return ranges_ != nullptr; }

  private:
    static constexpr float kHidden = -std::numeric_limits<float>::infinity();

    // Offset, window and prefix, clamped: beyond the bounds nothing changes, and sums cannot
    // overflow.
    static kernels::VisibleKeys causal_row(const AttentionOptions& o, int64_t b, int64_t queries,
                                           int64_t keys) {
        constexpr int64_t kFar = int64_t{1} << 62;
        int64_t offset = o.query_offset ? *mask_row<int64_t>(o.query_offset, b)
                         : o.causal     ? keys - queries
                                        : keys;
        int64_t window_start = o.window ? std::max(offset, -kFar) - *o.window + 1 : -queries;
        bool prefix = o.prefix_length && o.prefix_length->dim() == 1;
        int64_t length = prefix ? *mask_row<int64_t>(o.prefix_length, b) : 0;
        // Not cut to the keys: a query behind the last key may be in the prefix or not.
        return {.offset = std::clamp(offset, -queries, kFar),
                .window_start = std::clamp(window_start, -queries, keys),
                .prefix = length,
                .first = 0,
                .last = keys,
                .added = nullptr,
                .ranges = nullptr};
    }

    // A bias in log2 units: finite values stay finite, although the largest are out of range. NaN
    // hides a key, as -inf does.
    static float in_log2(float bias) {
        constexpr float kLog2e = 1.44269504f, kMost = std::numeric_limits<float>::max();
        if (!(bias > kHidden)) return kHidden;
        return bias > kMost ? bias : std::clamp(bias * kLog2e, -kMost, kMost);
    }

    static void add(kernels::VisibleKeys& row, float* added, const bool* shown, const float* bias,
                    int64_t keys) {
        int64_t first = keys, last = 0, count = 0;
        for (int64_t key = 0; key < keys; ++key) {
            added[key] = shown && !shown[key] ? kHidden : bias ? in_log2(bias[key]) : 0.0f;
            if (added[key] == kHidden) continue;
            first = std::min(first, key);
            last = key + 1;
            ++count;
        }
        row.first = std::min(first, last);
        row.last = last;
        if (bias || count < last - first)
            row.added = added;  // padding only at the ends needs no test of single keys
    }

    static void limit(kernels::VisibleKeys& row, kernels::KeyRange* ranges, const int64_t* starts,
                      const int64_t* prefixes, int64_t queries) {
        kernels::VisibleKeys one = row;
        for (int64_t t = 0; t < queries; ++t) {
            if (prefixes) one.prefix = prefixes[t];
            int64_t start = std::max(one.start(t), starts ? starts[t] : 0);
            ranges[t] = {static_cast<int32_t>(std::min(start, row.last)),
                         static_cast<int32_t>(one.limit(t))};
        }
        row.ranges = ranges;
    }

    // Moves first and last to keys visible to some query; kernels read no others.
    static void tighten(kernels::VisibleKeys& row, int64_t queries) {
        if (queries == 0) return;
        int64_t first = row.start(0), last = row.limit(queries - 1);
        if (row.ranges) {
            for (int64_t t = 0; t < queries; ++t) {
                first = std::min<int64_t>(first, row.ranges[t].first);
                last = std::max<int64_t>(last, row.ranges[t].last);
            }
        }
        row.first = first;
        row.last = std::max(first, last);
    }

    std::vector<kernels::VisibleKeys> rows_;
    std::unique_ptr<float[]> added_;
    std::unique_ptr<kernels::KeyRange[]> ranges_;
};

kernels::Heads heads(const Tensor& t) {
    return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// The kernel arguments shared by both directions.
void describe(kernels::Attention& args, const AttentionArgs& a, const Visible& visible) {
    args.dtype = a.dtype;
    args.batch = a.q.size(0);
    args.queries = a.q.size(1);
    args.keys = a.k.size(1);
    args.heads = a.q.size(2);
    args.kv_heads = a.k.size(2);
    args.size = a.q.size(3);
    args.scale = a.scale;
    args.softcap = a.softcap;
    args.q = heads(a.q);
    args.k = heads(a.k);
    args.v = heads(a.v);
    args.visible = visible.rows();
}

int64_t tiles(const kernels::Attention& args) {
    return (args.rows() + kernels::kMostTileRows - 1) / kernels::kMostTileRows;
}

// Number of shares per group, such that no thread waits for another for more than a tenth of the
// time.
int64_t shares_for(const kernels::Attention& args) {
    int64_t threads = torch::stable::get_num_threads(), most = std::min(tiles(args), 2 * threads),
            shares = 1;
    auto waits = [&](int64_t tasks) {
        return 10 * ((tasks + threads - 1) / threads * threads) > 11 * tasks;
    };
    while (shares < most && waits(args.groups() * shares)) ++shares;
    return shares;
}

void decode(kernels::AttentionForward& args) {
    int64_t first = args.keys, last = 0;
    for (int64_t b = 0; b < args.batch; ++b) {
        first = std::min(first, args.visible[b].first);
        last = std::max(last, args.visible[b].last);
    }
    args.first_chunk = first / kernels::kDecodeChunk;
    args.chunks = std::max<int64_t>(
        (last + kernels::kDecodeChunk - 1) / kernels::kDecodeChunk - args.first_chunk, 0);
    int64_t chunks = args.chunks, size = kernels::attention_chunk_size(args);
    std::unique_ptr<float[]> partial(new float[args.groups() * chunks * size]);
    auto kernel = MLLAMA_CALL(attention_decode);
    auto merge = MLLAMA_CALL(attention_merge);
    int64_t chunk_work = std::min(args.keys, kernels::kDecodeChunk) * args.size;
    parallel_for(args.groups() * chunks, 1 + 16384 / (chunk_work + 1),
                 [&](int64_t begin, int64_t end) { kernel(args, partial.get(), begin, end); });
    parallel_for(args.groups(), 1 + 65536 / (chunks * size + 1),
                 [&](int64_t begin, int64_t end) { merge(args, partial.get(), begin, end); });
}

void prefill(const kernels::AttentionForward& args) {
    auto kernel = MLLAMA_CALL(attention_prefill);
    int64_t shares = shares_for(args);
    parallel_for(args.groups() * shares, 1,
                 [&](int64_t begin, int64_t end) { kernel(args, shares, begin, end); });
}

void backward(kernels::AttentionBackward& args) {
    // At least sixteen tasks of at least eight tiles. Depends on sizes alone, because the order of
    // the parts' sums determines the bits.
    int64_t groups = args.groups();
    args.parts = std::clamp<int64_t>(16 / std::max<int64_t>(groups, 1), 1,
                                     std::max<int64_t>(tiles(args) / 8, 1));
    std::unique_ptr<float[]> partial;
    if (args.parts > 1)
        partial.reset(new float[groups * args.parts * kernels::attention_sums(args)]);
    args.partial = partial.get();
    auto kernel = MLLAMA_CALL(attention_backward);
    parallel_for(groups * args.parts, 1,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    if (args.parts > 1) {
        auto sum = MLLAMA_CALL(attention_backward_sum);
        parallel_for(groups, 1, [&](int64_t begin, int64_t end) { sum(args, begin, end); });
    }
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const MaybeTensor& key_mask, const MaybeTensor& key_bias,
                                     const MaybeTensor& query_offset,
                                     const MaybeTensor& prefix_length, const MaybeTensor& first_key,
                                     bool causal, std::optional<int64_t> window,
                                     std::optional<double> scale, std::optional<double> softcap) {
    AttentionForwardArgs a("attention", q, k, v,
                           {key_mask, key_bias, query_offset, prefix_length, first_key, causal,
                            window, scale, softcap});
    Visible visible(a);
    kernels::AttentionForward args{};
    describe(args, a, visible);
    args.out = a.out.mutable_data_ptr();
    args.statistics = mutable_data<kernels::Statistic>(a.statistics);
    if (args.rows() <= kDecodeRows && !visible.ranges()) {
        decode(args);
    } else {
        prefill(args);
    }
    return {a.out, a.statistics};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& statistics, const MaybeTensor& key_mask, const MaybeTensor& key_bias,
    const MaybeTensor& query_offset, const MaybeTensor& prefix_length, const MaybeTensor& first_key,
    bool causal, std::optional<int64_t> window, std::optional<double> scale,
    std::optional<double> softcap) {
    AttentionBackwardArgs a("_attention_backward", grad_out, q, k, v, out, statistics,
                            {key_mask, key_bias, query_offset, prefix_length, first_key, causal,
                             window, scale, softcap});
    Visible visible(a);
    kernels::AttentionBackward args{};
    describe(args, a, visible);
    args.grad_out = heads(a.grad_out);
    args.out = a.out.const_data_ptr();
    args.statistics = data<kernels::Statistic>(a.statistics);
    args.grad_q = a.grad_q.mutable_data_ptr();
    args.grad_k = a.grad_k.mutable_data_ptr();
    args.grad_v = a.grad_v.mutable_data_ptr();
    backward(args);
    return {a.grad_q, a.grad_k, a.grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    define(m, kAttentionSchema);
    define(m, kAttentionBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "attention", TORCH_BOX(&attention));
    implement(m, "_attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace mllama
