#pragma once

#include <cstdint>

namespace mllama::cuda::planted {

struct Planted {
    float* x;                // [64]: 0, 1, 2 ...
    const float* in;         // [64]: the same
    float* out;              // [64], nothing written
    uint32_t* counts;        // [2]: 0
    const uint16_t* halves;  // [2 * 256]: two 16x16 matrices of float16
};

// False if there is no kernel of this name.
bool launch_planted(const char* name, const Planted& arguments);

}  // namespace mllama::cuda::planted
