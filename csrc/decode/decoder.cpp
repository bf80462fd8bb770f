#include "decode/decoder.h"

#include <cmath>
#include <initializer_list>

#include "decode/memory.h"
#include "decode/team.h"
#include "kernels/cpu/adapter.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/cast.h"
#include "kernels/cpu/quantized_rows.h"
#include "kernels/cpu/rms_norm.h"
#include "kernels/cpu/rope.h"

namespace mllama {
namespace {

// A product's layer and its result.
struct Product {
    const DecoderLinear* linear;
    float* y;
};
using Products = std::initializer_list<Product>;

class Step {
  public:
    Step(const Decoder& decoder, const DecodeStep& step)
        : d_(decoder),
          s_(step),
          m_(decoder, step.rows,
             std::max(step.length, step.image_keys) / kernels::kDecodeChunk + 1),
          statistics_(step.rows * decoder.heads),
          hidden_(mutable_data<float>(step.hidden)) {
        rotate_tables();
        for (size_t i = 0; i < d_.layers.size(); ++i) visible_.push_back(visible_keys(i));
        for (size_t i = 0; i < d_.layers.size(); ++i) attention_.push_back(attention(i));
    }

    void run() {
        Team team;
        team.run([&](Team::Member member) {
            const DecoderLayer* before = nullptr;
            for (size_t i = 0; i < d_.layers.size(); ++i) {
                const DecoderLayer& layer = d_.layers[i];
                if (layer.cross && !s_.image_keys) continue;
                attend(member, i, before);
                feed_forward(member, layer);
                before = &layer;
            }
            finish(member, before);
        });
    }

  private:
    // ---- phases, each ended by all threads together

    void attend(Team::Member& member, size_t i, const DecoderLayer* before) {
        const DecoderLayer& layer = d_.layers[i];
        member.share(s_.rows, [&](int64_t first, int64_t last) {
            if (before) end_layer(*before, first, last);
            add_and_norm(layer.input, before != nullptr, m_.normed, first, last);
            prepare(layer.q, m_.normed, first, last);
        });
        if (layer.cross) {
            multiply(member, m_.normed, {{&layer.q, m_.q}});
        } else {
            multiply(member, m_.normed, {{&layer.q, m_.q}, {&layer.k, m_.k}, {&layer.v, m_.v}});
        }
        member.share(s_.rows, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                if (!layer.cross) append(layer, i, row);
                query(layer, row);
            }
        });
        const kernels::AttentionForward& args = attention_[i];
        auto scores = MLLAMA_CALL(attention_decode);
        member.share(args.groups() * args.chunks,
                     [&](int64_t first, int64_t last) { scores(args, m_.partial, first, last); });
        member.share(s_.rows, [&](int64_t first, int64_t last) {
            MLLAMA_CALL(attention_merge)
            (args, m_.partial, first * d_.kv_heads, last * d_.kv_heads);
            int64_t width = d_.heads * d_.head_dim;
            MLLAMA_CALL(cast)
            (cached(m_.attended, first * width), s_.cache_dtype, m_.q + first * width, Dtype::f32,
             (last - first) * width);
            prepare(layer.o, m_.q, first, last);
        });
        multiply(member, m_.q, {{&layer.o, m_.out}});
    }

    void feed_forward(Team::Member& member, const DecoderLayer& layer) {
        bool both = layer.pre_feedforward != nullptr;  // norms before and after the blocks
        member.share(s_.rows, [&](int64_t first, int64_t last) {
            if (layer.cross) scale_rows(layer.attention_gate, first, last);
            if (both) norm(layer.post_attention, m_.out, d_.hidden, first, last, m_.rstd);
            add_and_norm(both ? layer.pre_feedforward : layer.post_attention, true, m_.normed,
                         first, last);
            prepare(layer.gate, m_.normed, first, last);
        });
        multiply(member, m_.normed, {{&layer.gate, m_.gate}, {&layer.up, m_.up}});
        member.share(s_.rows, [&](int64_t first, int64_t last) {
            kernels::Gated args{.activation = d_.activation,
                                .dtype = Dtype::f32,
                                .width = d_.intermediate,
                                .gate = m_.gate,
                                .up = m_.up,
                                .gate_stride = d_.intermediate,
                                .up_stride = d_.intermediate,
                                .y = m_.gate,
                                .large = false};
            MLLAMA_CALL(gated)(args, first * d_.intermediate, last * d_.intermediate);
            prepare(layer.down, m_.gate, first, last);
        });
        multiply(member, m_.gate, {{&layer.down, m_.out}});
    }

    void finish(Team::Member& member, const DecoderLayer* before) {
        member.share(s_.rows, [&](int64_t first, int64_t last) {
            if (before) end_layer(*before, first, last);
            add_and_norm(d_.norm, before != nullptr, mutable_data<float>(s_.out), first, last);
        });
    }

    // The products with x, whose activations `prepare` left, as one list of blocks.
    void multiply(Team::Member& member, const float* x, Products products) {
        share(
            member, products, [](const DecoderLinear& linear) { return linear.rank(); },
            [&](const Product& p, int64_t begin, int64_t end, float* small) {
                MLLAMA_CALL(adapter_down)(adapter(p, x, small), begin, end);
            });
        share(
            member, products,
            [](const DecoderLinear& linear) { return kernels::block_count(linear.out); },
            [&](const Product& p, int64_t begin, int64_t end, float* small) {
                MLLAMA_CALL(packed_product)(arguments(*p.linear, nullptr, p.y), begin, end);
                if (!p.linear->adapter) return;
                MLLAMA_CALL(adapter_up)
                (adapter(p, x, small), begin * kernels::kLanes,
                 std::min(end * kernels::kLanes, p.linear->out));
            });
    }

    // Shares out the tasks of several products, as many as count(linear) gives for each, as one
    // list. body(product, first, last, its part of m_.small)
    template <class Count, class Body>
    void share(Team::Member& member, Products products, Count&& count, Body&& body) {
        int64_t tasks = 0;
        for (const Product& p : products) tasks += count(*p.linear);
        if (tasks == 0) return;
        member.share(tasks, [&](int64_t first, int64_t last) {
            float* small = m_.small;
            for (const Product& p : products) {
                int64_t own = count(*p.linear);
                int64_t begin = std::max<int64_t>(first, 0), end = std::min(last, own);
                if (begin < end) body(p, begin, end, small);
                first -= own, last -= own;
                small += s_.rows * p.linear->rank();
            }
        });
    }

    // ---- rows

    // The last steps of a layer on its output, before that is added to hidden.
    void end_layer(const DecoderLayer& layer, int64_t first, int64_t last) {
        norm(layer.post_feedforward, m_.out, d_.hidden, first, last, m_.rstd);
        if (!layer.cross) return;
        scale_rows(layer.mlp_gate, first, last);
        for (int64_t row = first; row < last; ++row) {
            float* out = m_.out + row * d_.hidden;
            if (!s_.sees_image[row]) std::fill(out, out + d_.hidden, 0.0f);
        }
    }

    void scale_rows(float factor, int64_t first, int64_t last) {
        for (int64_t i = first * d_.hidden; i < last * d_.hidden; ++i) m_.out[i] *= factor;
    }

    // The rows [first, last) of x, `width` wide, become their norms where there is one. rstd is
    // scratch that no other thread writes.
    void norm(DecoderNorm weight, float* x, int64_t width, int64_t first, int64_t last,
              float* rstd) {
        if (!weight) return;
        kernels::RmsNorm args = norm_arguments(weight, width);
        args.x = x;
        args.y = x;
        args.rstd = rstd;
        MLLAMA_CALL(rms_norm)(args, first, last);
    }

    // hidden += out, where there is such a result yet; y = the norm of hidden.
    void add_and_norm(DecoderNorm weight, bool add, float* y, int64_t first, int64_t last) {
        kernels::RmsNorm args = norm_arguments(weight, d_.hidden);
        args.x = add ? m_.out : hidden_;
        args.residual = add ? hidden_ : nullptr;
        args.hidden = hidden_;
        args.y = y;
        args.rstd = m_.rstd;
        MLLAMA_CALL(rms_norm)(args, first, last);
    }

    // Leaves x as the activations of a layer, and of others with the same input and packing.
    void prepare(const DecoderLinear& linear, const float* x, int64_t first, int64_t last) {
        MLLAMA_CALL(packed_activations)(arguments(linear, x, nullptr), first, last);
    }

    // Norms and turns a row's q and k, and writes k and v to the cache.
    void append(const DecoderLayer& layer, size_t i, int64_t row) {
        int64_t heads = d_.heads, kv = d_.kv_heads, size = d_.head_dim;
        float *q = m_.q + row * heads * size, *k = m_.k + row * kv * size,
              *v = m_.v + row * kv * size;
        norm(layer.q_norm, q, size, 0, heads, m_.rstd + row * heads);
        norm(layer.k_norm, k, size, 0, kv, m_.rstd + row * heads);
        kernels::Rope args{.dtype = Dtype::f32,
                           .tokens = 1,
                           .half = size / 2,
                           .sign = 1,
                           .q = {q, q, heads, 0, 0, size},
                           .k = {k, k, kv, 0, 0, size},
                           .cos = &cos_[(layer.rope * s_.rows + row) * size / 2],
                           .sin = &sin_[(layer.rope * s_.rows + row) * size / 2],
                           .cos_batch_stride = 0,
                           .sin_batch_stride = 0};
        MLLAMA_CALL(rope)(args, 0, 1);
        write(s_.keys[i], row, k);
        write(s_.values[i], row, v);
    }

    // The heads of a new position, x, into a buffer of the cache.
    void write(const Tensor& buffer, int64_t row, const float* x) {
        int64_t size = d_.head_dim, stride = buffer.size(2) * buffer.size(3);
        int64_t at = row * d_.kv_heads * stride + s_.length * buffer.size(3);
        for (int64_t head = 0; head < d_.kv_heads; ++head, at += stride, x += size) {
            if (s_.quantized) {
                MLLAMA_CALL(quantize_rows)
                (x, Dtype::f32, mutable_data<int8_t>(buffer) + at, 1, size);
            } else {
                MLLAMA_CALL(cast)
                (x, Dtype::f32, cached(buffer.mutable_data_ptr(), at), s_.cache_dtype, size);
            }
        }
    }

    // A row's q in the cache's dtype.
    void query(const DecoderLayer& layer, int64_t row) {
        int64_t width = d_.heads * d_.head_dim;
        float* q = m_.q + row * width;
        if (layer.cross) norm(layer.q_norm, q, d_.head_dim, 0, d_.heads, m_.rstd + row * d_.heads);
        MLLAMA_CALL(cast)
        (q, Dtype::f32, cached(m_.query, row * width), s_.cache_dtype, width);
    }

    // ---- the kernels' arguments

    void* cached(void* p, int64_t i) const {
        return static_cast<char*>(p) + i * size_of(s_.cache_dtype);
    }

    kernels::PackedLinear arguments(const DecoderLinear& linear, const float* x, float* y) const {
        return {.packing = linear.packing,
                .dtype = Dtype::f32,
                .rows = s_.rows,
                .in = linear.in,
                .out = linear.out,
                .x = x,
                .activations = m_.activations,
                .weight = linear.weight,
                .bias = linear.bias,
                .y = y};
    }

    kernels::Adapter adapter(const Product& product, const float* x, float* small) const {
        const DecoderLinear& linear = *product.linear;
        const DecoderAdapter& own = *linear.adapter;
        return {.rows = s_.rows,
                .in = linear.in,
                .out = linear.out,
                .rank = own.rank,
                .scale = own.scale,
                .a_dtype = own.a_dtype,
                .b_dtype = own.b_dtype,
                .x = x,
                .a = own.a,
                .b = own.b,
                .small = small,
                .y = product.y};
    }

    kernels::RmsNorm norm_arguments(DecoderNorm weight, int64_t width) const {
        return {.dtype = Dtype::f32,
                .weight_dtype = Dtype::f32,
                .width = width,
                .eps = d_.eps,
                .offset = d_.norm_offset,
                .x = nullptr,
                .residual = nullptr,
                .weight = weight,
                .hidden = nullptr,
                .y = nullptr,
                .rstd = nullptr};
    }

    std::vector<kernels::VisibleKeys> visible_keys(size_t i) const {
        int64_t window = d_.layers[i].window, last = s_.length + 1;
        std::vector<kernels::VisibleKeys> rows;
        if (d_.layers[i].cross) {
            for (int64_t row = 0; row < s_.rows; ++row)
                rows.push_back(
                    {.offset = s_.image_keys,
                     .window_start = 0,
                     .prefix = 0,
                     .first = 0,
                     .last = s_.image_keys,
                     .added = s_.image_bias ? s_.image_bias + row * s_.image_keys : nullptr,
                     .ranges = nullptr});
            return rows;
        }
        for (int64_t row = 0; row < s_.rows; ++row) {
            int64_t start = window ? std::max<int64_t>(last - window, 0) : 0;
            int64_t first = std::max(s_.first_key[row], start);
            rows.push_back({.offset = s_.length,
                            .window_start = first,
                            .prefix = 0,
                            .first = first,
                            .last = last,
                            .added = nullptr,
                            .ranges = nullptr});
        }
        return rows;
    }

    kernels::AttentionForward attention(size_t i) {
        const DecoderLayer& layer = d_.layers[i];
        if (layer.cross && !s_.image_keys) return {};
        int64_t size = d_.head_dim, length = s_.keys[i].size(3);  // of a cached row
        int64_t head = s_.keys[i].size(2) * length, row = d_.kv_heads * head;
        int64_t keys = layer.cross ? s_.image_keys : s_.length + 1, first = keys;
        for (const kernels::VisibleKeys& row : visible_[i]) first = std::min(first, row.first);
        kernels::AttentionForward a{};
        a.dtype = s_.cache_dtype, a.quantized = s_.quantized;
        a.batch = s_.rows, a.queries = 1, a.keys = keys;
        a.heads = d_.heads, a.kv_heads = d_.kv_heads, a.size = size;
        a.scale = layer.scale, a.softcap = layer.softcap;
        a.q = {m_.query, d_.heads * size, d_.heads * size, size};
        a.k = {s_.keys[i].const_data_ptr(), row, length, head};
        a.v = {s_.values[i].const_data_ptr(), row, length, head};
        a.visible = visible_[i].data();
        a.out = m_.attended;
        a.statistics = statistics_.data();
        a.first_chunk = first / kernels::kDecodeChunk;
        a.chunks = (keys - 1) / kernels::kDecodeChunk + 1 - a.first_chunk;
        return a;
    }

    // cos and sin of every position's angles, [frequencies, rows, head_dim / 2].
    void rotate_tables() {
        for (const float* frequencies : d_.frequencies) {
            for (int64_t position : s_.positions) {
                for (int64_t i = 0; i < d_.head_dim / 2; ++i) {
                    float angle = static_cast<float>(position) * frequencies[i];
                    cos_.push_back(std::cos(angle));
                    sin_.push_back(std::sin(angle));
                }
            }
        }
    }

    const Decoder& d_;
    const DecodeStep& s_;
    Memory m_;
    std::vector<float> cos_, sin_;
    std::vector<kernels::Statistic> statistics_;
    std::vector<std::vector<kernels::VisibleKeys>> visible_;  // per layer
    std::vector<kernels::AttentionForward> attention_;        // per layer
    float* hidden_;
};

}  // namespace

void run_step(const Decoder& decoder, const DecodeStep& step) { Step(decoder, step).run(); }

}  // namespace mllama
