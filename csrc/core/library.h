// Registration of operators, each under two overloads: the default one, which has its autograd
// formula in Python, and `kernel`, which has none and costs less to call.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace mllama {

inline void define(torch::stable::detail::StableLibrary& m, const char* schema) {
    m.def(schema);
    std::string kernel(schema);
    m.def(kernel.insert(kernel.find('('), ".kernel").c_str());
}

inline void implement(torch::stable::detail::StableLibrary& m, const char* name,
                      void (*function)(StableIValue*, uint64_t, uint64_t)) {
    m.impl(name, function);
    m.impl((std::string(name) + ".kernel").c_str(), function);
}

}  // namespace mllama
