// decode_step: schema, checks and shapes, the same on every device. Numbers that are in tensors are
// checked by those who read them.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/cpu/quantized_rows.h"
#include "ops/decoders.h"

namespace mllama {

constexpr char kDecodeStepSchema[] =
    "decode_step(int decoder, Tensor(a!) hidden, Tensor positions, Tensor(b!)[] keys, "
    "Tensor(c!)[] values, Tensor length, Tensor? first_key, int image_keys, Tensor? image_mask, "
    "Tensor? sees_image) -> Tensor";

struct DecodeArgs {
    DecodeArgs(int64_t number, const Tensor& hidden, const Tensor& positions,
               std::vector<Tensor> keys_, std::vector<Tensor> values_, const Tensor& length,
               const MaybeTensor& first_key, int64_t image_keys, const MaybeTensor& image_mask,
               const MaybeTensor& sees_image)
        : decoder(find_decoder(number)),
          hidden(hidden),
          positions(positions),
          length(length),
          keys(std::move(keys_)),
          values(std::move(values_)),
          first_key(first_key),
          image_mask(image_mask),
          sees_image(sees_image),
          image_keys(image_keys) {
        const Decoder& d = *decoder;
        check(hidden.dim() == 3 && hidden.size(2) == d.hidden && hidden.is_contiguous() &&
                  hidden.scalar_type() == ScalarType::Float && hidden.numel() > 0,
              kOp, "hidden");
        check(device_of(hidden) == d.device, kOp, "hidden: its device is not the decoder's");
        batch = hidden.size(0), queries = hidden.size(1);
        check_list("positions", positions, ScalarType::Long, rows());
        check_list("length", length, ScalarType::Long, 1);
        bool reads_images = std::any_of(d.layers.begin(), d.layers.end(),
                                        [](const DecoderLayer& l) { return l.cross; });
        check(image_keys >= 0 && (image_keys == 0 || reads_images), kOp, "image_keys");
        check_caches("keys", keys);
        check_caches("values", values);
        for (size_t i = 0; i < keys.size(); ++i) {
            check(d.layers[i].cross || keys[i].size(2) == values[i].size(2), kOp, "values");
        }
        check(quantized() || type == ScalarType::Float || type == ScalarType::BFloat16 ||
                  type == ScalarType::Half,
              kOp, "keys");
        if (first_key) check_list("first_key", *first_key, ScalarType::Long, batch);
        if (image_mask) check_list("image_mask", *image_mask, ScalarType::Bool, batch * image_keys);
        if (sees_image) check_list("sees_image", *sees_image, ScalarType::Bool, rows());
        out = new_float(hidden, {batch, queries, d.hidden});
    }

    static constexpr const char* kOp = "decode_step";

    int64_t rows() const { return batch * queries; }
    bool quantized() const { return type == ScalarType::Char; }
    // Of queries and attention's results.
    Dtype cache_dtype() const { return quantized() ? Dtype::f32 : dtype_of(kOp, "keys", type); }

    std::shared_ptr<const Decoder> decoder;
    Tensor hidden, positions, length;
    std::vector<Tensor> keys, values;
    MaybeTensor first_key, image_mask, sees_image;
    int64_t image_keys, batch, queries;
    int64_t capacity =
        std::numeric_limits<int32_t>::max();  // positions that all caches have room for
    ScalarType type = ScalarType::Undefined;  // of caches
    Tensor out;

  private:
    // A contiguous tensor of so many elements on hidden's device.
    void check_list(const char* name, const Tensor& t, ScalarType type, int64_t size) const {
        check(t.scalar_type() == type && t.is_contiguous() && t.numel() == size &&
                  device_of(t) == decoder->device,
              kOp, name);
    }

    // Every cache is [batch, kv_heads, capacity, head_dim], with room for the new positions or the
    // keys of images; quantized rows are longer.
    void check_caches(const char* name, const std::vector<Tensor>& caches) {
        const Decoder& d = *decoder;
        check(caches.size() == d.layers.size(), kOp, name);
        for (size_t i = 0; i < caches.size(); ++i) {
            bool cross = d.layers[i].cross;
            if (cross && image_keys == 0) continue;
            const Tensor& t = caches[i];
            if (type == ScalarType::Undefined) type = t.scalar_type();
            int64_t size = quantized() ? kernels::quantized_row_bytes(d.head_dim) : d.head_dim;
            check(t.dim() == 4 && t.size(0) == batch && t.size(1) == d.kv_heads &&
                      t.size(2) >= (cross ? image_keys : queries) && t.size(3) == size &&
                      t.is_contiguous() && t.scalar_type() == type && device_of(t) == d.device,
                  kOp, name);
            if (!cross) capacity = std::min(capacity, t.size(2));
        }
    }
};

}  // namespace mllama
