#include "simd/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace mllama {
namespace {

#define MLLAMA_ROW(name, ...) #name,
constexpr const char* kNames[] = {MLLAMA_ISA_TABLE(MLLAMA_ROW)};
#undef MLLAMA_ROW

Isa from_name(const std::string& name) {
    for (size_t i = 0; i < std::size(kNames); ++i) {
        if (name == kNames[i]) return static_cast<Isa>(i);
    }
    throw std::invalid_argument("instruction set must be one of " + isa_names() + ", got '" + name +
                                "'");
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

Isa find_best() {
    Isa best = Isa::scalar;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#define HAS __builtin_cpu_supports
#define MLLAMA_ROW(name, has, ...) \
    if (!has) return best;         \
    best = Isa::name;
    MLLAMA_ISA_TABLE(MLLAMA_ROW)
#undef MLLAMA_ROW
#undef HAS
    return best;
}

}  // namespace

Isa best_isa() {
    static const Isa best = find_best();
    return best;
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }
void set_isa(const std::string& name) { current().store(checked(name), std::memory_order_relaxed); }
std::string isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::string isa_names() {
    std::string names;
    for (const char* name : kNames) names += (names.empty() ? "" : " ") + std::string(name);
    return names;
}

}  // namespace mllama
