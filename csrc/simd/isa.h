// Which instruction set the kernels run with: found once from the CPU, lowered by MLLAMA_CPU_ISA.
//
// A kernel is declared for every instruction set (in kernels/cpu/<op>.h), called through the chosen
// one (in ops/<op>.cpp), and defined inside `namespace mllama::kernels::MLLAMA_ISA` (in
// kernels/cpu/<op>.cpp):
//     MLLAMA_KERNEL(void, scale_rows, (const float* x, float* y, int64_t n))
//     MLLAMA_CALL(scale_rows)(x, y, n);
#pragma once

#include <cstddef>
#include <string>

#include "simd/isa_table.h"

namespace mllama {

#define MLLAMA_ROW(name, ...) name,
enum class Isa { MLLAMA_ISA_TABLE(MLLAMA_ROW) };
#undef MLLAMA_ROW

Isa best_isa();     // the best this CPU has
Isa current_isa();  // the one in use
// Throws std::invalid_argument for an unknown name or one the CPU lacks.
void set_isa(const std::string& name);
std::string isa_name(Isa isa);
std::string isa_names();  // of all that were compiled, with spaces between

// One kernel's variants in the table's order -> that of the instruction set in use.
template <class F, size_t N>
F choose(F const (&variants)[N]) {
    return variants[static_cast<int>(current_isa())];
}

}  // namespace mllama

#define MLLAMA_DECLARE(isa, has, flags, ret, name, args) \
    namespace isa {                                      \
    ret name args;                                       \
    }
#define MLLAMA_KERNEL(ret, name, args) MLLAMA_ISA_TABLE(MLLAMA_DECLARE, ret, name, args)

#define MLLAMA_VARIANT(isa, has, flags, name) &::mllama::kernels::isa::name,
#define MLLAMA_CALL(name) ::mllama::choose({MLLAMA_ISA_TABLE(MLLAMA_VARIANT, name)})
