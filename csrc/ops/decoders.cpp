#include "ops/decoders.h"

#include <map>
#include <mutex>

#include "ops/packed_linear.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace mllama {
namespace {

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
        d.device = device_of(tensors_.back());
        for (const Tensor& t : tensors_) {
            check(t.numel() == 0 || device_of(t) == d.device, kOp, "tensors: more than one device");
        }
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

}  // namespace

std::shared_ptr<const Decoder> find_decoder(int64_t number) { return decoders().get(number); }

STABLE_TORCH_LIBRARY_IMPL(mllama, CompositeExplicitAutograd, m) {
    m.impl("_decoder_new", TORCH_BOX(&decoder_new));
    m.impl("_decoder_free", TORCH_BOX(&decoder_free));
}

}  // namespace mllama
