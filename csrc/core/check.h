// A broken precondition becomes std::invalid_argument. The text is short: the operator's check in
// Python, which runs when this was thrown, raises the one that users read.
#pragma once

#include <stdexcept>
#include <string>

namespace mllama {

inline void check(bool condition, const char* op, const char* what) {
    if (!condition) throw std::invalid_argument(std::string(op) + ": invalid " + what);
}

}  // namespace mllama
