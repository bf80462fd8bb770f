#include "core/launcher.h"
#include "kernels/cuda/attention.h"
#include "ops/attention.h"

namespace mllama {
namespace {

kernels::Heads heads(const Tensor& t) {
    return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// Whether rows can be copied in pieces of 16 bytes.
bool is_aligned(const Tensor& t) {
    int64_t piece = 16 / static_cast<int64_t>(t.element_size());
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.size(3) % piece == 0 &&
           t.stride(0) % piece == 0 && t.stride(1) % piece == 0 && t.stride(2) % piece == 0;
}

// Tells the launcher of a mask's tensor.
template <class T>
cuda::Mask<T> mask(Launcher& launcher, const char* name, const MaybeTensor& t) {
    if (!t) return {nullptr, 0};
    launcher.reads(name, *t);
    bool shared = t->dim() == 0 || t->size(0) == 1;
    return {data<T>(*t), shared ? 0 : t->stride(0)};
}

// The kernels' arguments shared by both directions.
void describe(cuda::Attention& args, const AttentionArgs& a, Launcher& launcher) {
    const AttentionOptions& o = a.options;
    launcher.reads("q", a.q);
    launcher.reads("k", a.k);
    launcher.reads("v", a.v);
    args.dtype = a.dtype;
    args.batch = a.q.size(0);
    args.queries = static_cast<int>(a.q.size(1));
    args.keys = static_cast<int>(a.k.size(1));
    args.heads = static_cast<int>(a.q.size(2));
    args.kv_heads = static_cast<int>(a.k.size(2));
    args.size = static_cast<int>(a.q.size(3));
    args.group_size = args.heads / args.kv_heads;
    args.rows = args.queries * args.group_size;
    args.scale = a.scale;
    args.softcap = a.softcap;
    args.q = heads(a.q);
    args.k = heads(a.k);
    args.v = heads(a.v);
    args.aligned = is_aligned(a.q) && is_aligned(a.k) && is_aligned(a.v);
    args.masks = {.key_mask = mask<bool>(launcher, "key_mask", o.key_mask),
                  .key_bias = mask<float>(launcher, "key_bias", o.key_bias),
                  .query_offset = mask<int64_t>(launcher, "query_offset", o.query_offset),
                  .prefix_length = mask<int64_t>(launcher, "prefix_length", o.prefix_length),
                  .first_key = mask<int64_t>(launcher, "first_key", o.first_key),
                  .prefix_per_query = o.prefix_length && o.prefix_length->dim() == 2,
                  .first_key_per_query = true,
                  .causal = o.causal,
                  .window = o.window.value_or(0)};
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
    Launcher launcher("attention", a.q);
    cuda::AttentionForward args{};
    describe(args, a, launcher);
    args.out = a.out.mutable_data_ptr();
    args.statistics = mutable_data<kernels::Statistic>(a.statistics);
    args.parts = cuda::attention_parts(args);
    launcher.writes("out", a.out);
    launcher.writes("statistics", a.statistics);
    std::optional<Tensor> partial;  // lives until the kernels are launched
    if (args.parts > 1) {
        partial = new_float(a.q, {args.batch, args.kv_heads, args.rows, args.parts, args.size + 2});
        args.partial = mutable_data<float>(*partial);
        launcher.writes("partial", *partial);
    }
    cuda::attention(args, launcher.stream());
    launcher.done();
    return {a.out, a.statistics};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& statistics, const MaybeTensor& key_mask, const MaybeTensor& key_bias,
    const MaybeTensor& query_offset, const MaybeTensor& prefix_length, const MaybeTensor& first_key,
    bool causal, std::optional<int64_t> window, std::optional<double> scale,
    std::optional<double> softcap) {
    const char* op = "_attention_backward";
    AttentionBackwardArgs a(op, grad_out, q, k, v, out, statistics,
                            {key_mask, key_bias, query_offset, prefix_length, first_key, causal,
                             window, scale, softcap});
    Launcher launcher(op, a.q);
    cuda::AttentionBackward args{};
    describe(args, a, launcher);
    Tensor deltas = new_float(a.q, {args.batch, args.heads, args.queries});
    launcher.reads("grad_out", a.grad_out);
    launcher.reads("out", a.out);
    launcher.reads("statistics", a.statistics);
    launcher.writes("deltas", deltas);
    launcher.writes("grad_q", a.grad_q);
    launcher.writes("grad_k", a.grad_k);
    launcher.writes("grad_v", a.grad_v);
    args.grad_out = heads(a.grad_out);
    args.aligned = args.aligned && is_aligned(a.grad_out);
    args.out = a.out.const_data_ptr();
    args.statistics = data<kernels::Statistic>(a.statistics);
    args.deltas = mutable_data<float>(deltas);
    args.grad_q = a.grad_q.mutable_data_ptr();
    args.grad_k = a.grad_k.mutable_data_ptr();
    args.grad_v = a.grad_v.mutable_data_ptr();
    cuda::attention_backward(args, launcher.stream());
    launcher.done();
    return {a.grad_q, a.grad_k, a.grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) {
    implement(m, "attention", TORCH_BOX(&attention));
    implement(m, "_attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace mllama
