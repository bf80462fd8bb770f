#include "simd/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace mllama {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

Isa from_name(const std::string& name) {
    for (int i = 0; i < 4; ++i) {
        if (name == kNames[i]) return static_cast<Isa>(i);
    }
    throw std::invalid_argument(
        "instruction set must be scalar, avx2, avx512 or avx512_bf16, got '" + name + "'");
}

Isa checked(const std::string& name) {
    Isa isa = from_name(name);
    if (isa > best_isa()) {
        throw std::invalid_argument("instruction set " + name +
                                    " is not available here; the best is " + isa_name(best_isa()));
    }
    return isa;
}

std::atomic<Isa>& current() {
    static std::atomic<Isa> isa = [] {
        const char* forced = std::getenv("MLLAMA_CPU_ISA");
        return forced && *forced ? checked(forced) : best_isa();
    }();
    return isa;
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
    // Each level needs all that its objects are compiled with (CMakeLists.txt, flags_<isa>).
    static const Isa best = [] {
        __builtin_cpu_init();
        bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
        bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
        bool bf16 =
            avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
        return bf16 ? Isa::avx512_bf16 : avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::scalar;
    }();
    return best;
#else
    return Isa::scalar;
#endif
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }
void set_isa(const std::string& name) { current().store(checked(name), std::memory_order_relaxed); }
std::string isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace mllama
