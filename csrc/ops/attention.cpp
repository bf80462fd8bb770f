#include "kernels/cpu/attention.h"

#include <cmath>
#include <limits>
#include <memory>

#include "core/tensor.h"

namespace mllama {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Up to this many rows a group goes to the decode kernel, which packs nothing; above, packing pays
// (measured).
constexpr int64_t kDecodeRows = 24;

// Which keys queries see, and how scores are made: the arguments beside q, k and v.
struct Options {
    MaybeTensor key_mask, key_bias, query_offset, prefix_length, first_key;
    bool causal;
    std::optional<int64_t> window;
    std::optional<double> scale, softcap;
};

void check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
    check_value(q.dim() == 4 && k.dim() == 4, op,
                ": q and k must be [batch, length, heads, head size], got ", Shape{q}, " and ",
                Shape{k});
    int64_t size = q.size(3), heads = q.size(2), kv_heads = k.size(2);
    check_value(size >= 16 && size <= 256, op,
                ": the head size (last of q) must be 16 to 256, got ", size);
    check_value(k.size(0) == q.size(0) && k.size(3) == size, op, ": q ", Shape{q}, " and k ",
                Shape{k}, " must agree in batch and head size");
    check_value(kv_heads > 0 && heads % kv_heads == 0, op, ": q's ", heads,
                " heads must be a multiple of k's ", kv_heads);
    check_value(v.sizes() == k.sizes(), op, ": v must have k's shape ", Shape{k}, ", got ",
                Shape{v});
    check_value(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op,
                ": k and v must have q's dtype");
    check_value(q.size(1) < (1 << 30) && k.size(1) < (1 << 30), op,
                ": more than 2^30 queries or keys");
}

// A mask's tensor, dense: [batch] or [batch, width], and [1] (or []) or [1, width] where one row
// may serve the whole batch.
MaybeTensor mask(const char* op, const char* name, const MaybeTensor& t, ScalarType type,
                 bool shared, int64_t batch, std::optional<int64_t> width = std::nullopt) {
    if (!t) return t;
    bool fits = t->dim() == 0 ? shared && !width
                              : t->dim() == (width ? 2 : 1) &&
                                    (t->size(0) == batch || (shared && t->size(0) == 1)) &&
                                    (!width || t->size(1) == *width);
    auto shape = [&](int64_t rows) {
        return "[" + std::to_string(rows) + (width ? ", " + std::to_string(*width) : "") + "]";
    };
    check_value(fits, op, ": ", name, " must be ", shape(batch),
                shared && batch != 1 ? " or " + shape(1) : "", ", got ", Shape{*t});
    check_value(t->scalar_type() == type, op, ": ", name, " has the wrong dtype");
    return dense(*t);
}

// Row b of a mask's tensor.
template <class T>
const T* mask_row(const MaybeTensor& t, int64_t b) {
    if (!t) return nullptr;
    int64_t width = t->dim() == 2 ? t->size(1) : 1;
    return data<T>(*t) + (t->dim() == 0 || t->size(0) == 1 ? 0 : b * width);
}

// What the queries of each batch row see, from the masks' tensors.
class Visible {
  public:
    Visible(const char* op, const Tensor& q, const Tensor& k, const Options& o) : rows_(q.size(0)) {
        int64_t batch = q.size(0), queries = q.size(1), keys = k.size(1);
        check_value(o.causal || !o.query_offset, op,
                    ": query_offset has a meaning only with causal=True");
        check_value(o.causal || !o.prefix_length, op,
                    ": prefix_length has a meaning only with causal=True");
        check_value(o.causal || !o.window, op, ": window has a meaning only with causal=True");
        check_value(!o.window || (*o.window > 0 && *o.window < int64_t{1} << 62), op,
                    ": window must be 1 to 2**62 - 1");
        MaybeTensor offset =
            mask(op, "query_offset", o.query_offset, ScalarType::Long, true, batch);
        bool each = o.prefix_length && o.prefix_length->dim() == 2;  // query has its own prefix
        MaybeTensor prefix = mask(op, "prefix_length", o.prefix_length, ScalarType::Long, false,
                                  batch, each ? std::optional(queries) : std::nullopt);
        MaybeTensor start =
            mask(op, "first_key", o.first_key, ScalarType::Long, true, batch, queries);
        MaybeTensor shown = mask(op, "key_mask", o.key_mask, ScalarType::Bool, false, batch, keys);
        MaybeTensor bias = mask(op, "key_bias", o.key_bias, ScalarType::Float, true, batch, keys);
        if (shown || bias) added_.reset(new float[batch * keys]);
        for (int64_t b = 0; b < batch; ++b) {
            int64_t diagonal = offset     ? *mask_row<int64_t>(offset, b)
                               : o.causal ? keys - queries
                                          : keys;
            // Within bounds where the subtraction cannot overflow.
            int64_t window_start =
                o.window ? std::max(diagonal, -(int64_t{1} << 62)) - *o.window + 1 : -queries;
            int64_t front = prefix && !each ? *mask_row<int64_t>(prefix, b) : 0;
            rows_[b] = {// Beyond these bounds nothing changes, and sums cannot overflow.
                        .offset = std::clamp(diagonal, -queries, keys),
                        .window_start = std::clamp(window_start, -queries, keys),
                        .prefix = std::clamp<int64_t>(front, 0, keys),
                        .first = 0,
                        .last = keys,
                        .added = nullptr,
                        .ranges = nullptr};
            if (added_)
                add(rows_[b], added_.get() + b * keys, mask_row<bool>(shown, b),
                    mask_row<float>(bias, b), keys);
            const int64_t* starts = mask_row<int64_t>(start, b);
            // Starts that hide nothing are as none: a graph that was compiled for both then does
            // what the other does.
            if (each || std::any_of(starts, starts + (starts ? queries : 0),
                                    [](int64_t key) { return key > 0; })) {
                if (!ranges_) ranges_.reset(new kernels::KeyRange[batch * queries]);
                limit(rows_[b], ranges_.get() + b * queries, starts,
                      each ? mask_row<int64_t>(prefix, b) : nullptr, queries);
            }
            tighten(rows_[b], queries);
        }
    }
    const kernels::VisibleKeys* rows() const { return rows_.data(); }
    bool ranges() const { return ranges_ != nullptr; }

  private:
    static constexpr float kHidden = -std::numeric_limits<float>::infinity();

    // A bias in log2 units: finite where it is finite, though the largest are out of range there.
    // NaN hides, as -inf.
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
            row.added = added;  // padding at the ends alone needs no look at single keys
    }

    static void limit(kernels::VisibleKeys& row, kernels::KeyRange* ranges, const int64_t* starts,
                      const int64_t* prefixes, int64_t queries) {
        kernels::VisibleKeys one = row;
        for (int64_t t = 0; t < queries; ++t) {
            if (prefixes) one.prefix = std::clamp<int64_t>(prefixes[t], 0, row.last);
            int64_t start = std::max(one.start(t), starts ? starts[t] : 0);
            ranges[t] = {static_cast<int32_t>(std::min(start, row.last)),
                         static_cast<int32_t>(one.limit(t))};
        }
        row.ranges = ranges;
    }

    // Moves first and last to the keys that some query sees: no kernel reads others.
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
Tensor empty_as(const Tensor& t) {
    return new_empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)});
}

void describe(kernels::Attention& args, const char* op, const Tensor& q, const Tensor& k,
              const Tensor& v, const Visible& visible, const Options& o) {
    args.dtype = dtype_of(op, "q", q);
    args.batch = q.size(0);
    args.queries = q.size(1);
    args.keys = k.size(1);
    args.heads = q.size(2);
    args.kv_heads = k.size(2);
    args.size = q.size(3);
    args.scale =
        static_cast<float>(o.scale ? *o.scale : 1 / std::sqrt(static_cast<double>(args.size)));
    check_value(!o.softcap || (*o.softcap > 1e-30 && *o.softcap < 1e30), op,
                ": softcap must be positive");
    args.softcap = static_cast<float>(o.softcap.value_or(0));
    args.q = heads(q);
    args.k = heads(k);
    args.v = heads(v);
    args.visible = visible.rows();
}

int64_t tiles(const kernels::Attention& args) {
    return (args.rows() + kernels::kMostTileRows - 1) / kernels::kMostTileRows;
}

// Into how many shares each group is cut so that no thread waits for another longer than a tenth of
// the time.
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

std::tuple<Tensor, Tensor> attention(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                     const MaybeTensor& key_mask, const MaybeTensor& key_bias,
                                     const MaybeTensor& query_offset,
                                     const MaybeTensor& prefix_length, const MaybeTensor& first_key,
                                     bool causal, std::optional<int64_t> window,
                                     std::optional<double> scale, std::optional<double> softcap) {
    const char* op = "attention";
    const Options options{key_mask, key_bias, query_offset, prefix_length, first_key,
                          causal,   window,   scale,        softcap};
    check_inputs(op, q_, k_, v_);
    Visible visible(op, q_, k_, options);
    Tensor q = last_dense(q_), k = last_dense(k_), v = last_dense(v_);
    Tensor out = empty_as(q), statistics = new_float(q, {q.size(0), q.size(2), q.size(1), 2});
    kernels::AttentionForward args{};
    describe(args, op, q, k, v, visible, options);
    args.out = out.mutable_data_ptr();
    args.statistics = mutable_data<kernels::Statistic>(statistics);
    if (args.rows() <= kDecodeRows && !visible.ranges()) {
        decode(args);
    } else {
        auto kernel = MLLAMA_CALL(attention_prefill);
        int64_t shares = shares_for(args);
        parallel_for(args.groups() * shares, 1,
                     [&](int64_t begin, int64_t end) { kernel(args, shares, begin, end); });
    }
    return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
    const Tensor& out_, const Tensor& statistics_, const MaybeTensor& key_mask,
    const MaybeTensor& key_bias, const MaybeTensor& query_offset, const MaybeTensor& prefix_length,
    const MaybeTensor& first_key, bool causal, std::optional<int64_t> window,
    std::optional<double> scale, std::optional<double> softcap) {
    const char* op = "_attention_backward";
    const Options options{key_mask, key_bias, query_offset, prefix_length, first_key,
                          causal,   window,   scale,        softcap};
    check_inputs(op, q_, k_, v_);
    for (const Tensor* t : {&grad_out_, &out_}) {
        check_value(t->sizes() == q_.sizes() && t->scalar_type() == q_.scalar_type(), op,
                    ": grad_out and out must be as q");
    }
    check_value(statistics_.dim() == 4 && statistics_.size(0) == q_.size(0) &&
                    statistics_.size(1) == q_.size(2) && statistics_.size(2) == q_.size(1) &&
                    statistics_.size(3) == 2 && statistics_.scalar_type() == ScalarType::Float,
                op, ": statistics must be float32 [batch, heads, queries, 2]");
    Visible visible(op, q_, k_, options);
    Tensor q = last_dense(q_), k = last_dense(k_), v = last_dense(v_),
           grad_out = last_dense(grad_out_);
    Tensor out = dense(out_), statistics = dense(statistics_), grad_q = empty_as(q),
           grad_k = empty_as(k), grad_v = empty_as(v);
    kernels::AttentionBackward args{};
    describe(args, op, q, k, v, visible, options);
    args.grad_out = heads(grad_out);
    args.out = out.const_data_ptr();
    args.statistics = data<kernels::Statistic>(statistics);
    args.grad_q = grad_q.mutable_data_ptr();
    args.grad_k = grad_k.mutable_data_ptr();
    args.grad_v = grad_v.mutable_data_ptr();
    // Sixteen tasks or more, of eight tiles or more. By the sizes alone: the parts are sums, whose
    // order makes the bits.
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
    return {grad_q, grad_k, grad_v};
}

}  // namespace

#define OPTIONS                                                                         \
    "Tensor? key_mask, Tensor? key_bias, Tensor? query_offset, Tensor? prefix_length, " \
    "Tensor? first_key, bool causal, int? window, float? scale, float? softcap"

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    m.def("attention(Tensor q, Tensor k, Tensor v, " OPTIONS
          ") -> (Tensor out, Tensor statistics)");
    m.def(
        "_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, "
        "Tensor statistics, " OPTIONS ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    m.impl("attention", TORCH_BOX(&attention));
    m.impl("_attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace mllama
