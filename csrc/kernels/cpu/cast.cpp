#include "kernels/cpu/cast.h"

#include "simd/vec.h"

namespace mllama::kernels::MLLAMA_ISA {

using namespace simd::MLLAMA_ISA;

void cast(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t size) {
    dispatch(from_dtype, [&](auto f) {
        dispatch(to_dtype, [&](auto t) {
            const auto* x = static_cast<const decltype(f)*>(from);
            auto* y = static_cast<decltype(t)*>(to);
            for_vectors(size, [&](int64_t i, int n) { put(y + i, at(x + i, n), n); });
        });
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
