// CUDA's stream without CUDA's headers.
#pragma once

struct CUstream_st;

namespace mllama::cuda {

using Stream = CUstream_st*;

}  // namespace mllama::cuda
