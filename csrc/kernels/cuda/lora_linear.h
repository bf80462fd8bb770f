// Launchers of the three products of a low-rank update, as kernels/cpu/lora_linear.h defines them.
// With dropout the seed is read from `seed`, in the device's memory, and not from the arguments.
#pragma once

#include "kernels/cpu/lora_linear.h"
#include "kernels/cuda/stream.h"

namespace mllama::cuda {

void low_rank_down(const kernels::LowRank& args, const int64_t* seed, Stream stream);
void low_rank_up(const kernels::LowRank& args, const int64_t* seed, Stream stream);
void low_rank_outer(const kernels::LowRank& args, const int64_t* seed, Stream stream);

}  // namespace mllama::cuda
