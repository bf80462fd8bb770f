// attention: schemas, checks and tensors, shared by all devices.
#pragma once

#include <cmath>

#include "core/tensor.h"

namespace mllama {

// Arguments of attention besides q, k and v: visible keys, and how scores are computed. To add one:
// here, in the schema, and in the two functions of attention.cpp.
struct AttentionOptions {
    MaybeTensor key_mask;       // bool [B, S]
    MaybeTensor key_bias;       // float32 [B or 1, S]
    MaybeTensor query_offset;   // int64 [], [1] or [B]
    MaybeTensor prefix_length;  // int64 [B] or [B, T]
    MaybeTensor first_key;      // int64 [B or 1, T]
    bool causal;
    std::optional<int64_t> window;
    std::optional<double> scale, softcap;
};

#define MLLAMA_ATTENTION_OPTIONS                                                        \
    "Tensor? key_mask, Tensor? key_bias, Tensor? query_offset, Tensor? prefix_length, " \
    "Tensor? first_key, bool causal, int? window, float? scale, float? softcap"
constexpr char kAttentionSchema[] = "attention(Tensor q, Tensor k, Tensor v, "  //
    MLLAMA_ATTENTION_OPTIONS ") -> (Tensor out, Tensor statistics)";
constexpr char kAttentionBackwardSchema[] =
    "_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor statistics, " MLLAMA_ATTENTION_OPTIONS
    ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)";
#undef MLLAMA_ATTENTION_OPTIONS

struct AttentionArgs {
    AttentionArgs(const char* op, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                  const AttentionOptions& options_)
        : dtype(checked(op, q_, k_, v_)),
          options(options_),
          q(last_dense(q_)),
          k(last_dense(k_)),
          v(last_dense(v_)),
          scale(static_cast<float>(options.scale ? *options.scale
                                                 : 1 / std::sqrt(static_cast<double>(q.size(3))))),
          softcap(static_cast<float>(options.softcap.value_or(0))) {
        check_options(op);
    }

    Dtype dtype;
    AttentionOptions options;  // contiguous tensors
    Tensor q;                  // [B, T, H, D], any strides but the last one
    Tensor k, v;               // [B, S, KV, D]
    float scale, softcap;      // softcap 0 = none

  private:
    static Dtype checked(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
        check(q.dim() == 4 && q.size(3) >= 16 && q.size(3) <= 256, op, "q");
        check(k.dim() == 4 && k.size(0) == q.size(0) && k.size(3) == q.size(3) && k.size(2) > 0 &&
                  q.size(2) % k.size(2) == 0 && k.scalar_type() == q.scalar_type(),
              op, "k");
        check(v.sizes() == k.sizes() && v.scalar_type() == q.scalar_type(), op, "v");
        constexpr int64_t kMost = 1 << 30;  // so that kernels can count in int32
        int64_t rows = q.size(1) * (q.size(2) / k.size(2));
        check(q.size(1) < kMost && k.size(1) < kMost && rows < 2 * kMost, op, "length");
        return dtype_of(op, "q", q);
    }

    void check_options(const char* op) {
        AttentionOptions& o = options;
        int64_t batch = q.size(0), queries = q.size(1), keys = k.size(1);
        check(o.causal || !(o.query_offset || o.prefix_length || o.window), op, "causal");
        check(!o.window || (*o.window > 0 && *o.window < int64_t{1} << 62), op, "window");
        check(!o.softcap || (*o.softcap > 1e-30 && *o.softcap < 1e30), op, "softcap");
        using Width = std::optional<int64_t>;
        bool per_query = o.prefix_length && o.prefix_length->dim() == 2;
        check_mask(op, "key_mask", o.key_mask, ScalarType::Bool, false, batch, keys);
        check_mask(op, "key_bias", o.key_bias, ScalarType::Float, true, batch, keys);
        check_mask(op, "query_offset", o.query_offset, ScalarType::Long, true, batch, Width());
        check_mask(op, "prefix_length", o.prefix_length, ScalarType::Long, false, batch,
                   per_query ? Width(queries) : Width());
        check_mask(op, "first_key", o.first_key, ScalarType::Long, true, batch, queries);
    }

    // [batch] or [batch, width]; if shared by the batch also [1] (or []) or [1, width].
    static void check_mask(const char* op, const char* name, MaybeTensor& t, ScalarType type,
                           bool shared, int64_t batch, std::optional<int64_t> width) {
        if (!t) return;
        bool fits = t->dim() == 0 ? shared && !width
                                  : t->dim() == (width ? 2 : 1) &&
                                        (t->size(0) == batch || (shared && t->size(0) == 1)) &&
                                        (!width || t->size(1) == *width);
        check(fits && t->scalar_type() == type, op, name);
        t = dense(*t);
    }
};

struct AttentionForwardArgs : AttentionArgs {
    AttentionForwardArgs(const char* op, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                         const AttentionOptions& options_)
        : AttentionArgs(op, q_, k_, v_, options_),
          out(new_like(q)),
          statistics(new_float(q, {q.size(0), q.size(2), q.size(1), 2})) {}

    Tensor out;         // as q
    Tensor statistics;  // float32 [B, H, T, 2]: the highest score and the sum of exponentials
};

struct AttentionBackwardArgs : AttentionArgs {
    AttentionBackwardArgs(const char* op, const Tensor& grad_out_, const Tensor& q_,
                          const Tensor& k_, const Tensor& v_, const Tensor& out_,
                          const Tensor& statistics_, const AttentionOptions& options_)
        : AttentionArgs(op, q_, k_, v_, options_),
          grad_out(last_dense(grad_out_)),
          out(dense(out_)),
          statistics(dense(statistics_)),
          grad_q(new_like(q)),
          grad_k(new_like(k)),
          grad_v(new_like(v)) {
        auto as_q = [&](const Tensor& t) {
            return t.sizes() == q.sizes() && t.scalar_type() == q.scalar_type();
        };
        check(as_q(grad_out), op, "grad_out");
        check(as_q(out), op, "out");
        check(statistics.dim() == 4 && statistics.size(0) == q.size(0) &&
                  statistics.size(1) == q.size(2) && statistics.size(2) == q.size(1) &&
                  statistics.size(3) == 2 && statistics.scalar_type() == ScalarType::Float,
              op, "statistics");
    }

    Tensor grad_out, out, statistics;
    Tensor grad_q, grad_k, grad_v;
};

}  // namespace mllama
