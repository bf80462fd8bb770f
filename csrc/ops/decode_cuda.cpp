// decode_step as a sequence of launches on one stream. Nothing waits for the device, and what a
// launch does depends on sizes alone, so that a CUDA graph of a step can be replayed after `length`
// and the other tensors have changed.
#include "core/launcher.h"
#include "decode/products.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/gated.h"
#include "kernels/cuda/lora_linear.h"
#include "kernels/cuda/packed_linear.h"
#include "kernels/cuda/rms_norm.h"
#include "ops/decode.h"

namespace mllama {
namespace {

constexpr int64_t kMostRows = 16;  // that have the same bits beside each other as alone

class Step {
  public:
    Step(const DecodeArgs& args, Launcher& launcher)
        : a_(args), d_(*args.decoder), launcher_(launcher), rows_(args.rows()) {
        name_tensors();
        int64_t heads = d_.heads * d_.head_dim, kv_heads = d_.kv_heads * d_.head_dim;
        int64_t chunks = cuda::chunk_count(std::max({d_.hidden, heads, d_.intermediate}));
        normed_ = scratch("normed", rows_ * d_.hidden);
        out_ = scratch("out", rows_ * d_.hidden);
        q_ = scratch("q", rows_ * heads);
        k_ = scratch("k", rows_ * kv_heads);
        v_ = scratch("v", rows_ * kv_heads);
        query_ = scratch("query", rows_ * heads);  // of the cache's dtype
        attended_ = scratch("attended", rows_ * heads);
        gate_ = scratch("gate", rows_ * d_.intermediate);
        up_ = scratch("up", rows_ * d_.intermediate);
        rstd_ = scratch("rstd", rows_);
        small_ = scratch("small", rows_ * d_.ranks);
        int64_t angles = static_cast<int64_t>(d_.frequencies.size()) * rows_ * d_.head_dim / 2;
        cos_ = scratch("cos", angles);
        sin_ = scratch("sin", angles);
        codes_ = scratch("codes", rows_ * chunks * cuda::kChunkInputs / 4);
        scales_ = scratch("scales", rows_ * chunks * cuda::kChunkGroups);
        sums_ = scratch("sums", rows_ * chunks * cuda::kChunkGroups);
        partial_ = scratch("partial", partial_size());
    }

    void run() {
        start();
        const DecoderLayer* before = nullptr;
        for (size_t i = 0; i < d_.layers.size(); ++i) {
            const DecoderLayer& layer = d_.layers[i];
            if (layer.cross && !a_.image_keys) continue;
            enter(before, layer.input, normed_);
            attend(layer, i);
            feed_forward(layer);
            before = &layer;
        }
        enter(before, d_.norm, mutable_data<float>(a_.out));
    }

  private:
    // ---- a layer

    void start() {
        cuda::StepStart step{.batch = a_.batch,
                             .queries = a_.queries,
                             .capacity = a_.capacity,
                             .length = data<int64_t>(a_.length),
                             .first_key = a_.first_key ? data<int64_t>(*a_.first_key) : nullptr,
                             .positions = data<int64_t>(a_.positions),
                             .half = d_.head_dim / 2};
        for (size_t i = 0; i < d_.frequencies.size(); ++i) {
            cuda::start_step(step, d_.frequencies[i], cos(i), sin(i), stream());
        }
    }

    // The last steps of the layer before, if there is one, on its output, which is added to hidden;
    // y = the norm of hidden.
    void enter(const DecoderLayer* before, DecoderNorm weight, float* y) {
        if (before) {
            norm(before->post_feedforward);
            if (before->cross)
                scale(before->mlp_gate, a_.sees_image ? data<bool>(*a_.sees_image) : nullptr);
        }
        add_and_norm(weight, before != nullptr, y);
    }

    void attend(const DecoderLayer& layer, size_t i) {
        if (layer.cross) {
            multiply(normed_, {{&layer.q, q_}});
        } else {
            multiply(normed_, {{&layer.q, q_}, {&layer.k, k_}, {&layer.v, v_}});
        }
        cuda::place_heads(new_heads(layer, i), stream());
        cuda::attention_decode(attention(layer, i), a_.quantized(), stream());
        multiply(attended_, {{&layer.o, out_}});
        if (layer.cross) scale(layer.attention_gate, nullptr);
        bool both = layer.pre_feedforward != nullptr;  // norms before and after the blocks
        if (both) norm(layer.post_attention);
        add_and_norm(both ? layer.pre_feedforward : layer.post_attention, true, normed_);
    }

    void feed_forward(const DecoderLayer& layer) {
        multiply(normed_, {{&layer.gate, gate_}, {&layer.up, up_}});
        int64_t size = rows_ * d_.intermediate;
        cuda::gated({.activation = d_.activation,
                     .dtype = Dtype::f32,
                     .width = size,
                     .gate = gate_,
                     .up = up_,
                     .gate_stride = size,
                     .up_stride = size,
                     .y = gate_,
                     .large = false},
                    size, stream());
        multiply(gate_, {{&layer.down, out_}});
    }

    // ---- steps

    // Out becomes its norm where there is one.
    void norm(DecoderNorm weight) {
        if (!weight) return;
        cuda::rms_norm(norm_arguments(weight, out_, nullptr, out_), rows_, stream());
    }

    // hidden += out, where there is such a result yet; y = the norm of hidden.
    void add_and_norm(DecoderNorm weight, bool add, float* y) {
        float* hidden = mutable_data<float>(a_.hidden);
        cuda::rms_norm(norm_arguments(weight, add ? out_ : hidden, add ? hidden : nullptr, y),
                       rows_, stream());
    }

    void scale(float factor, const bool* sees_image) {
        cuda::scale_rows(out_, rows_, d_.hidden, factor, sees_image, stream());
    }

    // The products with x; layers with one input have all codes or all floats.
    void multiply(const float* x, Products products) {
        std::vector<kernels::PackedLinear> args;
        for (const Product& p : products) args.push_back(linear_arguments(*p.linear, x, p.y));
        if (kernels::size_of(args[0].packing).quantized)
            cuda::quantize_activations(args[0], stream());
        cuda::packed_linears(args.data(), static_cast<int>(args.size()), stream());
        for (const Product& p : products) {
            if (p.linear->adapter) add_adapter(*p.linear, x, p.y);
        }
    }

    void add_adapter(const DecoderLinear& linear, const float* x, float* y) {
        const DecoderAdapter& own = *linear.adapter;
        kernels::LowRank args{.rows = rows_,
                              .width = linear.in,
                              .rank = own.rank,
                              .stride = own.rank,
                              .dtype = Dtype::f32,
                              .factor_dtype = own.a_dtype,
                              .by_column = false,
                              .scale = own.scale,
                              .dropout = false,
                              .threshold = 0,
                              .seed = 0,
                              .x = const_cast<float*>(x),
                              .factor = const_cast<void*>(own.a),
                              .small = small_};
        cuda::low_rank_down(args, nullptr, stream());
        args.width = linear.out;
        args.factor_dtype = own.b_dtype;
        args.by_column = true;
        args.scale = 1;
        args.x = y;
        args.factor = const_cast<void*>(own.b);
        cuda::low_rank_up(args, nullptr, stream());
    }

    // ---- the kernels' arguments

    kernels::RmsNorm norm_arguments(DecoderNorm weight, const float* x, float* residual,
                                    float* y) const {
        return {.dtype = Dtype::f32,
                .weight_dtype = Dtype::f32,
                .width = d_.hidden,
                .eps = d_.eps,
                .offset = d_.norm_offset,
                .x = x,
                .residual = residual,
                .weight = weight,
                .hidden = residual,
                .y = y,
                .rstd = rstd_};
    }

    kernels::PackedLinear linear_arguments(const DecoderLinear& linear, const float* x,
                                           float* y) const {
        kernels::Activations activations{};
        activations.codes = reinterpret_cast<int8_t*>(codes_);
        activations.scales = scales_;
        activations.values = sums_;
        return {.packing = linear.packing,
                .dtype = Dtype::f32,
                .rows = rows_,
                .in = linear.in,
                .out = linear.out,
                .x = x,
                .activations = activations,
                .weight = linear.weight,
                .bias = linear.bias,
                .y = y,
                .activation = {}};
    }

    cuda::NewHeads new_heads(const DecoderLayer& layer, size_t i) const {
        return {.dtype = a_.cache_dtype(),
                .quantized = a_.quantized(),
                .rows = rows_,
                .queries = a_.queries,
                .heads = static_cast<int>(d_.heads),
                .kv_heads = layer.cross ? 0 : static_cast<int>(d_.kv_heads),
                .size = static_cast<int>(d_.head_dim),
                .eps = d_.eps,
                .norm_offset = d_.norm_offset,
                .q = q_,
                .k = k_,
                .v = v_,
                .q_norm = layer.q_norm,
                .k_norm = layer.k_norm,
                .cos = cos(layer.rope),
                .sin = sin(layer.rope),
                .query = query_,
                .keys = a_.keys[i].mutable_data_ptr(),
                .values = a_.values[i].mutable_data_ptr(),
                .capacity = a_.keys[i].size(2),
                .row = a_.keys[i].size(3),
                .length = data<int64_t>(a_.length)};
    }

    cuda::AttentionForward attention(const DecoderLayer& layer, size_t i) const {
        const Tensor& k = a_.keys[i];
        int64_t size = d_.head_dim, width = k.size(3), head = k.size(2) * width;
        cuda::AttentionForward args{};
        args.dtype = a_.cache_dtype();
        args.batch = a_.batch;
        args.queries = static_cast<int>(a_.queries);
        args.keys = static_cast<int>(keys_of(i));
        args.heads = static_cast<int>(d_.heads);
        args.kv_heads = static_cast<int>(d_.kv_heads);
        args.size = static_cast<int>(size);
        args.group_size = args.heads / args.kv_heads;
        args.rows = args.queries * args.group_size;
        args.scale = layer.scale;
        args.softcap = layer.softcap;
        args.q = {query_, a_.queries * d_.heads * size, d_.heads * size, size};
        args.k = {k.const_data_ptr(), d_.kv_heads * head, width, head};
        args.v = {a_.values[i].const_data_ptr(), d_.kv_heads * head, width, head};
        args.aligned = size * size_of(args.dtype) % 16 == 0 && is_aligned(query_) &&
                       is_aligned(args.k.data) && is_aligned(args.v.data);
        if (layer.cross) {
            if (a_.image_mask) args.masks.key_mask = {data<bool>(*a_.image_mask), a_.image_keys};
        } else {
            args.masks.causal = true;
            args.masks.window = layer.window;
            args.masks.query_offset = {data<int64_t>(a_.length), 0};
            if (a_.first_key) args.masks.first_key = {data<int64_t>(*a_.first_key), 1};
        }
        args.out = attended_;
        args.part_keys = cuda::decode_part_keys(args.keys);
        args.parts = parts_of(i);
        args.partial = partial_;
        return args;
    }

    static bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

    // ---- sizes and memory

    // Keys that layer i has room for.
    int64_t keys_of(size_t i) const {
        if (d_.layers[i].cross) return a_.image_keys;
        check(a_.keys[i].size(2) <= std::numeric_limits<int32_t>::max() / 2, a_.kOp, "keys");
        return a_.keys[i].size(2);
    }
    int parts_of(size_t i) const {
        int64_t keys = keys_of(i), part = cuda::decode_part_keys(keys);
        return static_cast<int>((keys + part - 1) / part);
    }
    int64_t partial_size() const {
        int most = 0;
        for (size_t i = 0; i < d_.layers.size(); ++i) most = std::max(most, parts_of(i));
        return rows_ * d_.heads * most * (d_.head_dim + 2);
    }

    // Floats on the device.
    float* scratch(const char* name, int64_t size) {
        memory_.push_back(new_float(a_.hidden, {size}));
        launcher_.scratch(name, memory_.back());
        return mutable_data<float>(memory_.back());
    }

    void name_tensors() {
        for (const Tensor& t : d_.tensors) {
            if (t.numel()) launcher_.reads("decoder", t);
        }
        launcher_.updates("hidden", a_.hidden);
        launcher_.reads("positions", a_.positions);
        launcher_.reads("length", a_.length);
        for (size_t i = 0; i < d_.layers.size(); ++i) {
            if (!d_.layers[i].cross) {
                launcher_.updates("keys", a_.keys[i]);
                launcher_.updates("values", a_.values[i]);
            } else if (a_.image_keys) {
                launcher_.reads("keys", a_.keys[i]);
                launcher_.reads("values", a_.values[i]);
            }
        }
        if (a_.first_key) launcher_.reads("first_key", *a_.first_key);
        if (a_.image_mask) launcher_.reads("image_mask", *a_.image_mask);
        if (a_.sees_image) launcher_.reads("sees_image", *a_.sees_image);
        launcher_.writes("result", a_.out);
    }

    cuda::Stream stream() const { return launcher_.stream(); }
    float* cos(int64_t rope) const { return cos_ + rope * rows_ * d_.head_dim / 2; }
    float* sin(int64_t rope) const { return sin_ + rope * rows_ * d_.head_dim / 2; }

    const DecodeArgs& a_;
    const Decoder& d_;
    Launcher& launcher_;
    const int64_t rows_;  // of products
    std::vector<Tensor> memory_;
    float *normed_, *out_, *q_, *k_, *v_, *query_, *attended_, *gate_, *up_, *rstd_, *small_;
    float *cos_, *sin_, *codes_, *scales_, *sums_, *partial_;
};

Tensor decode_step(int64_t number, Tensor hidden, Tensor positions, std::vector<Tensor> keys,
                   std::vector<Tensor> values, Tensor length, MaybeTensor first_key,
                   int64_t image_keys, MaybeTensor image_mask, MaybeTensor sees_image) {
    DecodeArgs a(number, hidden, positions, std::move(keys), std::move(values), length, first_key,
                 image_keys, image_mask, sees_image);
    check(a.rows() <= kMostRows, a.kOp, "hidden: it has more than 16 rows");
    Launcher launcher(a.kOp, hidden);
    Step(a, launcher).run();
    launcher.done();
    return a.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) {
    m.impl("decode_step", TORCH_BOX(&decode_step));
}

}  // namespace mllama
