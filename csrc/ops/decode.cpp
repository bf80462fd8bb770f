// decode_step and the decoders that it runs, which a number stands for: a call hands over no list
// of all weights.
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "core/threads.h"
#include "decode/decoder.h"
#include "kernels/cpu/quantized_rows.h"
#include "ops/packed_linear.h"

namespace mllama {
namespace {

constexpr char kNewSchema[] = "_decoder_new(Tensor[] tensors, int[] sizes, float[] numbers) -> int";
constexpr char kFreeSchema[] = "_decoder_free(int decoder) -> ()";
constexpr char kStepSchema[] =
    "decode_step(int decoder, Tensor(a!) hidden, Tensor positions, Tensor(b!)[] keys, "
    "Tensor(c!)[] values, Tensor length, Tensor? first_key, int image_keys, Tensor? image_mask, "
    "Tensor? sees_image) -> Tensor";

class Decoders {
  public:
    int64_t add(std::shared_ptr<const Decoder> decoder) {
        std::lock_guard lock(mutex_);
        all_[next_] = std::move(decoder);
        return next_++;
    }
    void remove(int64_t number) {
        std::lock_guard lock(mutex_);
        all_.erase(number);
    }
    std::mutex& mutex() { return mutex_; }
    std::shared_ptr<const Decoder> get(int64_t number) {
        std::lock_guard lock(mutex_);
        auto found = all_.find(number);
        check(found != all_.end(), "decode_step", "decoder");
        return found->second;
    }

  private:
    std::mutex mutex_;
    std::map<int64_t, std::shared_ptr<const Decoder>> all_;
    int64_t next_ = 1;
};

Decoders& decoders() {
    static Decoders* all = [] {
#if defined(__unix__) || defined(__APPLE__)
        // No other thread holds the mutex while a process is forked: its child could not free it.
        pthread_atfork([] { decoders().mutex().lock(); }, [] { decoders().mutex().unlock(); },
                       [] { decoders().mutex().unlock(); });
#endif
        return new Decoders;  // never destroyed: threads may outlive main
    }();
    return *all;
}

// Reads a decoder from the lists that model/fast_decoder.py writes, in its order.
class Reader {
  public:
    Reader(const std::vector<Tensor>& tensors, const std::vector<int64_t>& sizes,
           const std::vector<double>& numbers)
        : tensors_(tensors), sizes_(sizes), numbers_(numbers) {}

    Decoder decoder() {
        Decoder d{};
        d.hidden = size(), d.heads = size(), d.kv_heads = size(), d.head_dim = size();
        d.intermediate = size();
        d.activation = static_cast<kernels::Activation>(size());
        d.eps = number(), d.norm_offset = number();
        int64_t count = size(), ropes = size();
        check(d.hidden > 0 && d.heads > 0 && d.kv_heads > 0 && d.heads % d.kv_heads == 0 &&
                  d.head_dim > 0 && d.head_dim % 2 == 0 && d.head_dim <= 256 && count > 0,
              kOp, "sizes");
        for (int64_t i = 0; i < ropes; ++i) d.frequencies.push_back(vector(d.head_dim / 2, true));
        for (int64_t i = 0; i < count; ++i) d.layers.push_back(layer(d));
        d.norm = vector(d.hidden, true);
        for (const DecoderLayer& l : d.layers) {
            int64_t inner = l.cross ? l.q.rank() : l.q.rank() + l.k.rank() + l.v.rank();
            d.ranks =
                std::max({d.ranks, inner, l.o.rank(), l.gate.rank() + l.up.rank(), l.down.rank()});
        }
        d.tensors = tensors_;
        check(tensor_ == tensors_.size() && size_ == sizes_.size() && number_ == numbers_.size(),
              kOp, "sizes");
        return d;
    }

  private:
    static constexpr const char* kOp = "_decoder_new";

    DecoderLayer layer(const Decoder& d) {
        DecoderLayer l;
        l.cross = size() != 0, l.rope = size(), l.window = size();
        l.scale = number(), l.softcap = number();
        l.attention_gate = number(), l.mlp_gate = number();
        check(0 <= l.rope && l.rope < static_cast<int64_t>(d.frequencies.size()) && l.window >= 0,
              kOp, "sizes");
        l.input = vector(d.hidden, true);
        l.post_attention = vector(d.hidden, true);
        l.pre_feedforward = vector(d.hidden);
        l.post_feedforward = vector(d.hidden);
        l.q_norm = vector(d.head_dim);
        l.k_norm = vector(d.head_dim);
        int64_t queries = d.heads * d.head_dim, keys = d.kv_heads * d.head_dim;
        l.q = linear(d.hidden, queries);
        if (!l.cross) l.k = linear(d.hidden, keys), l.v = linear(d.hidden, keys);
        l.o = linear(queries, d.hidden);
        l.gate = linear(d.hidden, d.intermediate);
        l.up = linear(d.hidden, d.intermediate);
        l.down = linear(d.intermediate, d.hidden);
        return l;
    }

    // An empty tensor is none.
    const float* vector(int64_t width, bool needed = false) {
        Tensor t = floats();
        if (t.numel() == 0 && !needed) return nullptr;
        check(t.numel() == width, kOp, "tensors");
        return data<float>(t);
    }

    DecoderLinear linear(int64_t in, int64_t out) {
        DecoderLinear l{packing_of(kOp, size()), in, out, nullptr, nullptr, std::nullopt};
        Tensor weight = tensor();
        check_packed(kOp, weight, l.packing, out, in);
        l.weight = data<uint8_t>(weight);
        l.bias = vector(out);
        if (int64_t rank = size(); rank != 0) {
            check(rank > 0 && rank <= kMostFeatures, kOp, "sizes");
            Tensor a = factor(rank, in), b = factor(out, rank);
            l.adapter = {rank,
                         dtype_of(kOp, "tensors", a),
                         dtype_of(kOp, "tensors", b),
                         a.const_data_ptr(),
                         b.const_data_ptr(),
                         number()};
        }
        return l;
    }

    // [rows, width], of any float dtype.
    Tensor factor(int64_t rows, int64_t width) {
        Tensor t = tensor();
        dtype_of(kOp, "tensors", t);
        check(t.dim() == 2 && t.size(0) == rows && t.size(1) == width && t.is_contiguous(), kOp,
              "tensors");
        return t;
    }

    Tensor tensor() {
        check(tensor_ < tensors_.size(), kOp, "tensors");
        return tensors_[tensor_++];
    }
    Tensor floats() {
        Tensor t = tensor();
        check(t.scalar_type() == ScalarType::Float && t.is_contiguous(), kOp, "tensors");
        return t;
    }
    int64_t size() {
        check(size_ < sizes_.size(), kOp, "sizes");
        return sizes_[size_++];
    }
    float number() {
        check(number_ < numbers_.size(), kOp, "numbers");
        return static_cast<float>(numbers_[number_++]);
    }

    const std::vector<Tensor>& tensors_;
    const std::vector<int64_t>& sizes_;
    const std::vector<double>& numbers_;
    size_t tensor_ = 0, size_ = 0, number_ = 0;
};

int64_t decoder_new(std::vector<Tensor> tensors, std::vector<int64_t> sizes,
                    std::vector<double> numbers) {
    Decoder decoder = Reader(tensors, sizes, numbers).decoder();
    return decoders().add(std::make_shared<const Decoder>(std::move(decoder)));
}

void decoder_free(int64_t number) { decoders().remove(number); }

constexpr int64_t kLongest = int64_t{1} << 40;  // positions; sums of them do not overflow

// The dtype of the first buffer that a step reads or writes.
ScalarType cache_type(const Decoder& d, const std::vector<Tensor>& keys, int64_t image_keys) {
    check(keys.size() == d.layers.size(), "decode_step", "keys");
    size_t i = 0;
    while (i + 1 < keys.size() && d.layers[i].cross && image_keys == 0) ++i;
    return keys[i].scalar_type();
}

// Every cache is [batch, kv_heads, capacity, head_dim], with room for `length` positions, the new
// ones among them, or for the keys of images; quantized rows are longer.
void check_caches(const Decoder& d, const std::vector<Tensor>& caches, const char* name,
                  int64_t batch, int64_t length, int64_t image_keys, ScalarType type) {
    check(caches.size() == d.layers.size(), "decode_step", name);
    int64_t size = type == ScalarType::Char ? kernels::quantized_row_bytes(d.head_dim) : d.head_dim;
    for (size_t i = 0; i < caches.size(); ++i) {
        const Tensor& t = caches[i];
        int64_t keys = d.layers[i].cross ? image_keys : length;
        if (keys == 0) continue;
        check(t.dim() == 4 && t.size(0) == batch && t.size(1) == d.kv_heads && t.size(2) >= keys &&
                  t.size(3) == size && t.is_contiguous() && t.scalar_type() == type,
              "decode_step", name);
    }
}

// Which image keys each row sees, bool [batch, image_keys], becomes what is added to scores.
void read_mask(const Tensor& mask, DecodeStep& step, std::vector<float>& bias) {
    check(mask.scalar_type() == ScalarType::Bool && mask.is_contiguous() &&
              mask.numel() == step.batch * step.image_keys,
          "decode_step", "image_mask");
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    const bool* visible = data<bool>(mask);
    bias.resize(mask.numel());
    for (int64_t i = 0; i < mask.numel(); ++i) {
        bias[i] = visible[i] ? 0 : kHidden;
    }
    step.image_bias = bias.data();
}

Tensor decode_step(int64_t number, Tensor hidden, Tensor positions, std::vector<Tensor> keys,
                   std::vector<Tensor> values, Tensor past, MaybeTensor first_key,
                   int64_t image_keys, MaybeTensor image_mask, MaybeTensor sees_image) {
    const char* op = "decode_step";
    std::shared_ptr<const Decoder> decoder = decoders().get(number);
    const Decoder& d = *decoder;
    check(hidden.dim() == 3 && hidden.size(2) == d.hidden && hidden.is_contiguous() &&
              hidden.scalar_type() == ScalarType::Float && hidden.numel() > 0,
          op, "hidden");
    int64_t batch = hidden.size(0), queries = hidden.size(1), rows = batch * queries;
    check(past.scalar_type() == ScalarType::Long && past.numel() == 1, op, "length");
    int64_t length = *data<int64_t>(past);
    check(length >= 0 && length <= kLongest && image_keys >= 0, op, "length");
    ScalarType type = cache_type(d, keys, image_keys);
    bool quantized = type == ScalarType::Char;
    Dtype dtype = quantized ? Dtype::f32 : dtype_of(op, "keys", type);
    check_caches(d, keys, "keys", batch, length + queries, image_keys, type);
    check_caches(d, values, "values", batch, length + queries, image_keys, type);
    check(positions.scalar_type() == ScalarType::Long && positions.is_contiguous() &&
              positions.numel() == rows,
          op, "positions");
    DecodeStep step{.batch = batch,
                    .queries = queries,
                    .hidden = hidden,
                    .positions = {data<int64_t>(positions), data<int64_t>(positions) + rows},
                    .keys = std::move(keys),
                    .values = std::move(values),
                    .quantized = quantized,
                    .cache_dtype = dtype,
                    .length = length,
                    .first_key = std::vector<int64_t>(batch, 0),
                    .image_keys = image_keys,
                    .image_bias = nullptr,
                    .sees_image = std::vector<bool>(rows, true),
                    .out = new_float(hidden, {batch, queries, d.hidden})};
    if (first_key) {
        check(first_key->scalar_type() == ScalarType::Long && first_key->numel() == batch &&
                  first_key->is_contiguous(),
              op, "first_key");
        for (int64_t i = 0; i < batch; ++i) {
            step.first_key[i] = data<int64_t>(*first_key)[i];
            check(0 <= step.first_key[i] && step.first_key[i] <= length, op, "first_key");
        }
    }
    std::vector<float> bias;
    if (image_mask) read_mask(*image_mask, step, bias);
    if (sees_image) {
        check(sees_image->scalar_type() == ScalarType::Bool && sees_image->is_contiguous() &&
                  sees_image->numel() == rows,
              op, "sees_image");
        for (int64_t i = 0; i < rows; ++i) step.sees_image[i] = data<bool>(*sees_image)[i];
    }
    run_step(d, step);
    return step.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    m.def(kNewSchema);
    m.def(kFreeSchema);
    m.def(kStepSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }

STABLE_TORCH_LIBRARY_IMPL(mllama, CompositeExplicitAutograd, m) {
    m.impl("_decoder_new", TORCH_BOX(&decoder_new));
    m.impl("_decoder_free", TORCH_BOX(&decoder_free));
}

}  // namespace mllama
