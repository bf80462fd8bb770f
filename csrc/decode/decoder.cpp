#include "decode/decoder.h"

#include <cmath>

#include "decode/attention.h"
#include "decode/memory.h"
#include "decode/products.h"
#include "decode/team.h"
#include "kernels/cpu/adapter.h"
#include "kernels/cpu/cast.h"
#include "kernels/cpu/quantized_rows.h"
#include "kernels/cpu/rms_norm.h"
#include "kernels/cpu/rope.h"

namespace mllama {
namespace {

constexpr int64_t kGrain = 4;      // blocks of a product that a thread takes at least
constexpr int64_t kFewChunks = 4;  // of keys, whose results are merged with a row's other work

constexpr auto nothing = [] {};

class Step {
  public:
    Step(const Decoder& decoder, const DecodeStep& step)
        : d_(decoder),
          s_(step),
          rows_(step.rows()),
          m_(decoder, rows_,
             std::max(step.length + step.queries - 1, step.image_keys) / kernels::kDecodeChunk + 1),
          statistics_(rows_ * decoder.heads),
          hidden_(mutable_data<float>(step.hidden)) {
        rotate_tables();
        for (const DecoderLayer& layer : d_.layers) visible_.push_back(visible_keys(layer, s_));
        for (size_t i = 0; i < d_.layers.size(); ++i) {
            attention_.push_back(
                attention_arguments(d_, s_, i, m_, visible_[i], statistics_.data()));
        }
    }

    void run() {
        std::vector<size_t> active;  // layers that attend to no image are left out without one
        for (size_t i = 0; i < d_.layers.size(); ++i) {
            if (!d_.layers[i].cross || s_.image_keys) active.push_back(i);
        }
        Team team;
        team.run([&](Team::Member member) {
            const DecoderLayer* before = nullptr;
            auto enter = [&](const DecoderLayer* layer, int64_t first, int64_t last) {
                if (before) end_layer(*before, first, last);
                float* to = layer ? m_.normed : mutable_data<float>(s_.out);
                add_and_norm(layer ? layer->input : d_.norm, before != nullptr, to, first, last);
                if (layer) prepare(layer->q, m_.normed, first, last);
            };
            const DecoderLayer* first = active.empty() ? nullptr : &d_.layers[active[0]];
            member.share(
                rows_, 1, [&](int64_t begin, int64_t end) { enter(first, begin, end); }, nothing,
                nothing);
            for (size_t n = 0; n < active.size(); ++n) {
                const DecoderLayer& layer = d_.layers[active[n]];
                const DecoderLayer* next =
                    n + 1 < active.size() ? &d_.layers[active[n + 1]] : nullptr;
                attend(member, layer, active[n]);
                before = &layer;
                feed_forward(
                    member, layer, [&](int64_t begin, int64_t end) { enter(next, begin, end); },
                    next);
            }
        });
    }

  private:
    // ---- phases

    // body(begin, end) for all tasks, then rows(first, last) for all rows: one row by the thread
    // that ends the phase, more of them as a phase of their own. Who waits reads `next` ahead.
    template <class Body, class Rows>
    void phase(Team::Member& member, int64_t tasks, int64_t grain, Body&& body, Rows&& rows,
               Products next) {
        bool one = rows_ == 1;
        member.share(
            tasks, grain, body,
            [&] {
                if (one) rows(int64_t{0}, int64_t{1});
            },
            [&] { fetch(next, member.begin(count(next, blocks), kGrain)); });
        if (!one) member.share(rows_, 1, rows, nothing, nothing);
    }

    void attend(Team::Member& member, const DecoderLayer& layer, size_t i) {
        Products text = {{&layer.q, m_.q}, {&layer.k, m_.k}, {&layer.v, m_.v}},
                 image = {{&layer.q, m_.q}};
        multiply(member, m_.normed, layer.cross ? image : text,
                 [&](int64_t first, int64_t last) {
                     for (int64_t row = first; row < last; ++row) {
                         if (!layer.cross) append(layer, i, row);
                         query(layer, row);
                     }
                 },
                 {});
        const Product out{&layer.o, m_.out};
        const kernels::AttentionForward& args = attention_[i];
        auto scores = [&](int64_t first, int64_t last) {
            MLLAMA_CALL(attention_decode)(args, m_.partial, first, last);
        };
        auto merge = [&](int64_t first, int64_t last) {
            MLLAMA_CALL(attention_merge)(args, m_.partial, first, last);
        };
        // With more queries, a row of products is a part of the groups of its row of the batch.
        bool few = args.chunks <= kFewChunks && s_.queries == 1;
        auto rows = [&](int64_t first, int64_t last) {
            if (few) merge(first * d_.kv_heads, last * d_.kv_heads);
            int64_t width = d_.heads * d_.head_dim;
            MLLAMA_CALL(cast)
            (cached(m_.attended, first * width), s_.cache_dtype, m_.q + first * width, Dtype::f32,
             (last - first) * width);
            prepare(layer.o, m_.q, first, last);
        };
        if (few) {
            phase(member, args.groups() * args.chunks, 1, scores, rows, {out});
        } else {
            member.share(args.groups() * args.chunks, 1, scores, nothing, nothing);
            phase(member, args.groups(), 1, merge, rows, {out});
        }
        multiply(member, m_.q, {out},
                 [&](int64_t first, int64_t last) {
                     bool both =
                         layer.pre_feedforward != nullptr;  // norms before and after the blocks
                     if (layer.cross) scale_rows(layer.attention_gate, first, last);
                     if (both) norm(layer.post_attention, m_.out, d_.hidden, first, last, m_.rstd);
                     add_and_norm(both ? layer.pre_feedforward : layer.post_attention, true,
                                  m_.normed, first, last);
                     prepare(layer.gate, m_.normed, first, last);
                 },
                 {{&layer.gate, m_.gate}});
    }

    // `enter` leads to the next layer, if there is one.
    template <class Rows>
    void feed_forward(Team::Member& member, const DecoderLayer& layer, Rows&& enter,
                      const DecoderLayer* next) {
        const Product gate{&layer.gate, m_.gate}, up{&layer.up, m_.up}, down{&layer.down, m_.out};
        float* small = m_.small + rows_ * gate.linear->rank();  // of up
        adapters_down(member, m_.normed, {gate, up});
        phase(
            member, kernels::block_count(d_.intermediate), kGrain,
            [&](int64_t begin, int64_t end) {
                product(gate, m_.normed, m_.small, begin, end);
                product(up, m_.normed, small, begin, end);
                activate(begin * kernels::kLanes, std::min(end * kernels::kLanes, d_.intermediate));
            },
            [&](int64_t first, int64_t last) { prepare(layer.down, m_.gate, first, last); },
            {down});
        if (next) {
            multiply(member, m_.gate, {down}, enter, {{&next->q, m_.q}});
        } else {
            multiply(member, m_.gate, {down}, enter, {});
        }
    }

    // Columns of gate become the activation's products with up.
    void activate(int64_t first, int64_t last) {
        for (int64_t row = 0; row < rows_; ++row) {
            float* gate = m_.gate + row * d_.intermediate + first;
            kernels::Gated args{.activation = d_.activation,
                                .dtype = Dtype::f32,
                                .width = last - first,
                                .gate = gate,
                                .up = m_.up + row * d_.intermediate + first,
                                .gate_stride = 0,
                                .up_stride = 0,
                                .y = gate,
                                .large = false};
            MLLAMA_CALL(gated)(args, 0, last - first);
        }
    }

    // The products with x, whose activations `prepare` left, as one list of blocks.
    template <class Rows>
    void multiply(Team::Member& member, const float* x, Products products, Rows&& rows,
                  Products next) {
        adapters_down(member, x, products);
        phase(
            member, count(products, blocks), kGrain,
            [&](int64_t first, int64_t last) {
                each(products, blocks, m_.small, rows_, first, last,
                     [&](const Product& p, float* small, int64_t begin, int64_t end) {
                         product(p, x, small, begin, end);
                     });
            },
            rows, next);
    }

    void adapters_down(Team::Member& member, const float* x, Products products) {
        int64_t tasks = count(products, ranks);
        if (tasks == 0) return;
        member.share(
            tasks, 1,
            [&](int64_t first, int64_t last) {
                each(products, ranks, m_.small, rows_, first, last,
                     [&](const Product& p, float* small, int64_t begin, int64_t end) {
                         MLLAMA_CALL(adapter_down)(adapter(p, x, small), begin, end);
                     });
            },
            nothing, nothing);
    }

    void product(const Product& p, const float* x, float* small, int64_t begin, int64_t end) {
        MLLAMA_CALL(packed_product)(arguments(*p.linear, nullptr, p.y), begin, end);
        if (!p.linear->adapter) return;
        MLLAMA_CALL(adapter_up)
        (adapter(p, x, small), begin * kernels::kLanes,
         std::min(end * kernels::kLanes, p.linear->out));
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
                           .cos = &cos_[(layer.rope * rows_ + row) * size / 2],
                           .sin = &sin_[(layer.rope * rows_ + row) * size / 2],
                           .cos_batch_stride = 0,
                           .sin_batch_stride = 0};
        MLLAMA_CALL(rope)(args, 0, 1);
        write(s_.keys[i], row, k);
        write(s_.values[i], row, v);
    }

    // The heads of a new position, x, into a buffer of the cache.
    void write(const Tensor& buffer, int64_t row, const float* x) {
        int64_t size = d_.head_dim, stride = buffer.size(2) * buffer.size(3);
        int64_t at = row / s_.queries * d_.kv_heads * stride +
                     (s_.length + row % s_.queries) * buffer.size(3);
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
                .rows = rows_,
                .in = linear.in,
                .out = linear.out,
                .x = x,
                .activations = m_.activations,
                .weight = linear.weight,
                .bias = linear.bias,
                .y = y,
                .activation = {}};
    }

    kernels::Adapter adapter(const Product& product, const float* x, float* small) const {
        const DecoderLinear& linear = *product.linear;
        const DecoderAdapter& own = *linear.adapter;
        return {.rows = rows_,
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
    const int64_t rows_;  // of products
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
