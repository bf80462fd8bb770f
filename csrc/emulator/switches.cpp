// What the tests, in Python, set and read.
#include "emulator/emulator.h"

using mllama::emulator::counters;
using mllama::emulator::options;

extern "C" {

// The operators that have a CUDA kernel, with spaces between.
__attribute__((visibility("default"))) const char* mllama_emulator_operators() {
    return MLLAMA_CUDA_OPS;
}

__attribute__((visibility("default"))) void mllama_emulator_set(int architecture, int rotate,
                                                                int order, int arrival,
                                                                unsigned seed) {
    options() = {architecture, rotate != 0, static_cast<mllama::emulator::Order>(order),
                 static_cast<mllama::emulator::Arrival>(arrival), seed};
}

// Copies the counters and sets them to zero.
__attribute__((visibility("default"))) void mllama_emulator_take_counters(uint64_t (&out)[6]) {
    auto& c = counters();
    uint64_t values[] = {c.launches, c.blocks, c.threads, c.switches, c.collectives, c.accesses};
    for (int i = 0; i < 6; ++i) out[i] = values[i];
    c = {};
}

}  // extern "C"
