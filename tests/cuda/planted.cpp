// Runs a kernel of planted.cu on the tensors of test_emulator.py.
#include "planted.h"

#include <cstring>
#include <string>

#include "emulator/emulator.h"

using namespace mllama::emulator;
using mllama::cuda::planted::Planted;

// `error` gets the emulator's error, or "".
extern "C" __attribute__((visibility("default"))) void mllama_run_planted(const char* name,
                                                                          const Planted* p,
                                                                          char* error,
                                                                          size_t error_size) {
    allow_tensor(p->x, 64 * sizeof *p->x, Use::update, "x");
    allow_tensor(p->in, 64 * sizeof *p->in, Use::read, "in");
    allow_tensor(p->out, 64 * sizeof *p->out, Use::write, "out");
    allow_tensor(p->counts, 2 * sizeof *p->counts, Use::update, "counts");
    allow_tensor(p->halves, 512 * sizeof *p->halves, Use::read, "halves");
    std::string text;
    try {
        if (!launch_planted(name, *p)) text = "no kernel of this name";
        check_written();
    } catch (const Error& e) {
        text = e.what();
    }
    forget_tensors();
    std::strncpy(error, text.c_str(), error_size - 1);
}
