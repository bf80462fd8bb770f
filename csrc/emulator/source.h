// Where an address of this module is in its sources.
#pragma once

#include <string>

namespace mllama::emulator {

bool in_this_module(const void* address);
// " at FILE:LINE" of a call that returns to `caller`, with the callers that it was inlined into;
// by addr2line, else as an offset in the module.
std::string source_of(void* caller);

}  // namespace mllama::emulator
