#include "kernels/cpu/attention.h"

#include <cmath>
#include <limits>

#include "core/tensor.h"

namespace mllama {
namespace {

using MaybeTensor = std::optional<Tensor>;

// At most this many rows of queries a key head are served by the decode kernel, which packs nothing.
constexpr int64_t kDecodeRows = 24;

void check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
    check_value(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op,
                ": q, k and v must be [batch, length, heads, head size]");
    check_value(q.size(3) >= 16 && q.size(3) <= 256, op, ": the head size must be 16 to 256, got ", q.size(3));
    check_value(k.size(0) == q.size(0) && k.size(3) == q.size(3), op, ": q and k must agree in batch and head size");
    check_value(k.size(2) > 0 && q.size(2) % k.size(2) == 0, op, ": q's ", q.size(2),
                " heads must be a multiple of k's ", k.size(2));
    check_value(v.sizes() == k.sizes(), op, ": v must have k's shape");
    check_value(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op,
                ": q, k and v must have one dtype");
    check_value(q.size(1) < (1 << 30) && k.size(1) < (1 << 30), op, ": more than 2^30 positions");
}

Tensor unit_stride(const Tensor& t) { return t.stride(3) == 1 ? t : torch::stable::contiguous(t); }
kernels::Heads heads(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// What the queries of each batch row see, from the masks' tensors; holds what it points to.
class Visible {
  public:
    Visible(const char* op, const Tensor& q, const Tensor& k, const MaybeTensor& key_mask, const MaybeTensor& key_bias,
            const MaybeTensor& query_offset, const MaybeTensor& prefix_length, bool causal)
        : rows_(q.size(0)) {
        int64_t batch = q.size(0), queries = q.size(1), keys = k.size(1);
        check_value(causal || (!query_offset && !prefix_length), op, ": query_offset and prefix_length need causal");
        auto integers = [&](const char* name, const MaybeTensor& t, bool broadcast) {
            check_value(!t || (t->dim() == 1 && (t->size(0) == batch || (broadcast && t->size(0) == 1)) &&
                               t->scalar_type() == ScalarType::Long),
                        op, ": ", name, " must be int64 [", batch, broadcast ? "] or [1]" : "]");
            return t ? MaybeTensor(dense(*t)) : MaybeTensor();
        };
        MaybeTensor offset = integers("query_offset", query_offset, true),
                    prefix = integers("prefix_length", prefix_length, false);
        for (int64_t b = 0; b < batch; ++b) {
            kernels::VisibleKeys& row = rows_[b];
            row = {.offset = keys, .prefix = 0, .first = 0, .last = keys, .added = nullptr};
            if (causal) row.offset = keys - queries;
            if (offset) row.offset = data<int64_t>(*offset)[offset->size(0) == 1 ? 0 : b];
            if (prefix) row.prefix = data<int64_t>(*prefix)[b];
            // Beyond these values nothing changes, and sums cannot overflow.
            row.offset = std::clamp(row.offset, -queries - 1, keys);
            row.prefix = std::clamp<int64_t>(row.prefix, 0, keys);
        }
        if (key_mask || key_bias) add(op, batch, keys, key_mask, key_bias);
    }
    const kernels::VisibleKeys* rows() const { return rows_.data(); }

  private:
    void add(const char* op, int64_t batch, int64_t keys, const MaybeTensor& key_mask, const MaybeTensor& key_bias) {
        MaybeTensor mask, bias;
        if (key_mask) {
            check_value(key_mask->dim() == 2 && key_mask->size(0) == batch && key_mask->size(1) == keys &&
                            key_mask->scalar_type() == ScalarType::Bool,
                        op, ": key_mask must be bool [", batch, ", ", keys, "]");
            mask = dense(*key_mask);
        }
        if (key_bias) {
            check_value(key_bias->dim() == 2 && (key_bias->size(0) == batch || key_bias->size(0) == 1) &&
                            key_bias->size(1) == keys && key_bias->scalar_type() == ScalarType::Float,
                        op, ": key_bias must be float32 [", batch, " or 1, ", keys, "]");
            bias = dense(*key_bias);
        }
        constexpr float kHidden = -std::numeric_limits<float>::infinity();
        added_.resize(batch * keys);
        for (int64_t b = 0; b < batch; ++b) {
            const bool* visible = mask ? data<bool>(*mask) + b * keys : nullptr;
            const float* more = bias ? data<float>(*bias) + (bias->size(0) == 1 ? 0 : b * keys) : nullptr;
            float* added = added_.data() + b * keys;
            int64_t first = keys, last = 0, count = 0;
            for (int64_t key = 0; key < keys; ++key) {
                added[key] = visible && !visible[key] ? kHidden : more ? more[key] * 1.44269504f : 0.0f;
                if (added[key] == kHidden) continue;
                first = std::min(first, key);
                last = key + 1;
                ++count;
            }
            rows_[b].first = std::min(first, last);
            rows_[b].last = last;
            // Padding at the ends alone needs no look at single keys.
            if (more || count < last - first) rows_[b].added = added;
        }
    }

    std::vector<kernels::VisibleKeys> rows_;
    std::vector<float> added_;
};

template <class Args>
void describe(Args& args, const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Visible& visible,
              double scale) {
    args.dtype = dtype_of(op, "q", q);
    args.batch = q.size(0);
    args.queries = q.size(1);
    args.keys = k.size(1);
    args.heads = q.size(2);
    args.kv_heads = k.size(2);
    args.size = q.size(3);
    args.scale = static_cast<float>(scale);
    args.q = heads(q);
    args.k = heads(k);
    args.v = heads(v);
    args.visible = visible.rows();
}

// Into how many shares each of `pairs` equal pieces of work is cut so that every thread gets about as much.
int64_t shares_for(int64_t pairs, int64_t tiles) {
    int64_t threads = torch::stable::get_num_threads();
    if (threads == 1) return 1;
    int64_t most = std::min<int64_t>(tiles, 2 * threads), shares = 1;
    auto waste = [&](int64_t n) {  // of threads that wait for the last one
        int64_t rounds = (pairs * n + threads - 1) / threads;
        return static_cast<double>(rounds * threads) / static_cast<double>(pairs * n);
    };
    while (shares < most && waste(shares) > 1.1) ++shares;
    return shares;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const MaybeTensor& key_mask,
                                     const MaybeTensor& key_bias, const MaybeTensor& query_offset,
                                     const MaybeTensor& prefix_length, bool causal, double scale) {
    const char* op = "attention";
    check_inputs(op, q_, k_, v_);
    Visible visible(op, q_, k_, key_mask, key_bias, query_offset, prefix_length, causal);
    Tensor q = unit_stride(q_), k = unit_stride(k_), v = unit_stride(v_);
    Tensor out = new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
    Tensor lse = new_float(q, {q.size(0), q.size(2), q.size(1)});
    kernels::AttentionForward args{};
    describe(args, op, q, k, v, visible, scale);
    args.out = out.mutable_data_ptr();
    args.lse = mutable_data<float>(lse);
    if (out.numel() == 0) return {out, lse};

    if (args.rows() <= kDecodeRows) {
        int64_t chunks = kernels::attention_chunks(args), tasks = args.pairs() * chunks;
        std::unique_ptr<float[]> partial(new float[tasks * kernels::attention_chunk_size(args)]);
        auto decode = MLLAMA_CALL(attention_decode);
        auto merge = MLLAMA_CALL(attention_merge);
        int64_t task_work = std::min(args.keys, kernels::kDecodeChunk) * args.size;
        parallel_for(tasks, 1 + 16384 / (task_work + 1),
                     [&](int64_t begin, int64_t end) { decode(args, partial.get(), begin, end); });
        parallel_for(args.pairs(), 1 + 65536 / (chunks * kernels::attention_chunk_size(args) + 1),
                     [&](int64_t begin, int64_t end) { merge(args, partial.get(), begin, end); });
        return {out, lse};
    }
    auto prefill = MLLAMA_CALL(attention_prefill);
    int64_t shares = shares_for(args.pairs(), (args.rows() + 47) / 48);
    parallel_for(args.pairs() * shares, 1, [&](int64_t begin, int64_t end) { prefill(args, shares, begin, end); });
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out_, const Tensor& q_, const Tensor& k_,
                                                      const Tensor& v_, const Tensor& out_, const Tensor& lse_,
                                                      const MaybeTensor& key_mask, const MaybeTensor& key_bias,
                                                      const MaybeTensor& query_offset, const MaybeTensor& prefix_length,
                                                      bool causal, double scale) {
    const char* op = "_attention_backward";
    check_inputs(op, q_, k_, v_);
    for (const Tensor* t : {&grad_out_, &out_}) {
        check_value(t->sizes() == q_.sizes() && t->scalar_type() == q_.scalar_type(), op,
                    ": grad_out and out must be as q");
    }
    check_value(lse_.dim() == 3 && lse_.size(0) == q_.size(0) && lse_.size(1) == q_.size(2) &&
                    lse_.size(2) == q_.size(1) && lse_.scalar_type() == ScalarType::Float,
                op, ": lse must be float32 [batch, heads, queries]");
    Visible visible(op, q_, k_, key_mask, key_bias, query_offset, prefix_length, causal);
    Tensor q = unit_stride(q_), k = unit_stride(k_), v = unit_stride(v_), grad_out = unit_stride(grad_out_);
    Tensor out = dense(out_), lse = dense(lse_);
    auto like = [](const Tensor& t) { return new_empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)}); };
    Tensor grad_q = like(q), grad_k = like(k), grad_v = like(v);
    kernels::AttentionBackward args{};
    describe(args, op, q, k, v, visible, scale);
    args.grad_out = heads(grad_out);
    args.out = out.const_data_ptr();
    args.lse = data<float>(lse);
    args.grad_q = grad_q.mutable_data_ptr();
    args.grad_k = grad_k.mutable_data_ptr();
    args.grad_v = grad_v.mutable_data_ptr();
    // By the sizes alone, so that sums are made in the same order whatever the number of threads.
    int64_t tiles = (args.rows() + 47) / 48;
    args.parts = args.pairs() ? std::clamp<int64_t>(16 / args.pairs(), 1, std::max<int64_t>(tiles / 8, 1)) : 1;
    std::unique_ptr<float[]> partial;
    if (args.parts > 1) partial.reset(new float[args.pairs() * args.parts * kernels::attention_partial_size(args)]);
    args.partial = partial.get();
    auto backward = MLLAMA_CALL(attention_backward);
    parallel_for(args.pairs() * args.parts, 1, [&](int64_t begin, int64_t end) { backward(args, begin, end); });
    if (args.parts > 1) {
        auto sum = MLLAMA_CALL(attention_backward_sum);
        parallel_for(args.pairs(), 1, [&](int64_t begin, int64_t end) { sum(args, begin, end); });
    }
    return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    m.def(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? key_bias, Tensor? query_offset, "
        "Tensor? prefix_length, bool causal, float scale) -> (Tensor out, Tensor lse)");
    m.def(
        "_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_mask, "
        "Tensor? key_bias, Tensor? query_offset, Tensor? prefix_length, bool causal, float scale) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    m.impl("attention", TORCH_BOX(&attention));
    m.impl("_attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace mllama
