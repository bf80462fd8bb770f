#include "ops/decode.h"

namespace mllama {
namespace {

// Which image keys each row sees, bool [batch, image_keys], becomes what is added to scores.
void read_mask(const Tensor& mask, DecodeStep& step, std::vector<float>& bias) {
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
    DecodeArgs a(number, hidden, positions, std::move(keys), std::move(values), past, first_key,
                 image_keys, image_mask, sees_image);
    int64_t length = *data<int64_t>(past), rows = a.rows();
    check(0 <= length && length <= a.capacity - a.queries, a.kOp, "length");
    DecodeStep step{.batch = a.batch,
                    .queries = a.queries,
                    .hidden = hidden,
                    .positions = {data<int64_t>(positions), data<int64_t>(positions) + rows},
                    .keys = std::move(a.keys),
                    .values = std::move(a.values),
                    .quantized = a.quantized(),
                    .cache_dtype = a.cache_dtype(),
                    .length = length,
                    .first_key = std::vector<int64_t>(a.batch, 0),
                    .image_keys = image_keys,
                    .image_bias = nullptr,
                    .sees_image = std::vector<bool>(rows, true),
                    .out = a.out};
    if (first_key) {
        for (int64_t i = 0; i < a.batch; ++i) {
            step.first_key[i] = data<int64_t>(*first_key)[i];
            check(0 <= step.first_key[i] && step.first_key[i] <= length, a.kOp, "first_key");
        }
    }
    std::vector<float> bias;
    if (image_mask) read_mask(*image_mask, step, bias);
    if (sees_image) {
        for (int64_t i = 0; i < rows; ++i) step.sees_image[i] = data<bool>(*sees_image)[i];
    }
    run_step(*a.decoder, step);
    return step.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    m.def(kDecoderNewSchema);
    m.def(kDecoderFreeSchema);
    m.def(kDecodeStepSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }

}  // namespace mllama
