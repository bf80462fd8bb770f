// Which instruction set the kernels run with: found once from the CPU, lowered by MLLAMA_CPU_ISA.
//
// A kernel is declared for every instruction set and called through the chosen one:
//     MLLAMA_KERNEL(void, scale_rows, (const float* x, float* y, int64_t n));   // in
//     kernels/cpu/<op>.h MLLAMA_CALL(scale_rows)(x, y, n); // in ops/<op>.cpp
// and defined in kernels/cpu/<op>.cpp inside `namespace mllama::kernels::MLLAMA_ISA`.
#pragma once

#include <string>

namespace mllama {

enum class Isa { scalar, avx2, avx512, avx512_bf16 };

Isa best_isa();     // the best this CPU has
Isa current_isa();  // the one in use
void set_isa(
    const std::string& name);  // std::invalid_argument for an unknown name or one the CPU lacks
std::string isa_name(Isa isa);

template <class F>
F choose(F scalar, F avx2, F avx512, F avx512_bf16) {
    switch (current_isa()) {
        case Isa::avx512_bf16: return avx512_bf16;
        case Isa::avx512: return avx512;
        case Isa::avx2: return avx2;
        default: return scalar;
    }
}

}  // namespace mllama

#if defined(__x86_64__)
#define MLLAMA_KERNEL(ret, name, args) \
    namespace scalar {                 \
    ret name args;                     \
    }                                  \
    namespace avx2 {                   \
    ret name args;                     \
    }                                  \
    namespace avx512 {                 \
    ret name args;                     \
    }                                  \
    namespace avx512_bf16 {            \
    ret name args;                     \
    }
#define MLLAMA_CALL(name)                                                              \
    ::mllama::choose(&::mllama::kernels::scalar::name, &::mllama::kernels::avx2::name, \
                     &::mllama::kernels::avx512::name, &::mllama::kernels::avx512_bf16::name)
#else
#define MLLAMA_KERNEL(ret, name, args) \
    namespace scalar {                 \
    ret name args;                     \
    }
#define MLLAMA_CALL(name) (&::mllama::kernels::scalar::name)
#endif
