// The decoders that decode_step runs, which a number stands for: a call hands over no list of all
// weights. Devices share the registry.
#pragma once

#include <memory>

#include "decode/decoder.h"

namespace mllama {

constexpr char kDecoderNewSchema[] =
    "_decoder_new(Tensor[] tensors, int[] sizes, float[] numbers) -> int";
constexpr char kDecoderFreeSchema[] = "_decoder_free(int decoder) -> ()";

// Throws unless the number is a decoder's.
std::shared_ptr<const Decoder> find_decoder(int64_t number);

// A CUDA device's index; -1 for the CPU.
inline int32_t device_of(const Tensor& t) { return t.is_cuda() ? t.get_device_index() : -1; }

}  // namespace mllama
