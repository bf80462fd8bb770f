// The Python module mllama._C. Importing it registers the operators (static initializers of
// csrc/ops); what it exposes itself is only about the build and the CPU. No tensor passes through
// pybind11.
#include <pybind11/pybind11.h>

#include <torch/headeronly/version.h>

#include "simd/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "mllama's compiled operators";

    m.def(
        "build_info",
        [] {
            py::dict info;
            info["operators"] = MLLAMA_OPS;
            info["instruction_sets"] = mllama::isa_names();
            info["cuda_toolkit"] = MLLAMA_CUDA_TOOLKIT;
            info["cuda_operators"] = MLLAMA_CUDA_OPS;
            info["torch"] = TORCH_VERSION;
#if defined(__GNUC__) && !defined(__clang__)
            info["compiler"] = "GCC " __VERSION__;  // Clang's version begins with its name
#else
            info["compiler"] = __VERSION__;
#endif
            return info;
        },
        "What the extension was built with: operators, instruction sets, CUDA toolkit (its "
        "version, empty without one), operators that have a CUDA kernel, torch, compiler.");
    m.def(
        "isa", [] { return mllama::isa_name(mllama::current_isa()); },
        "The instruction set that the kernels use.\n\nRaises ValueError if MLLAMA_CPU_ISA names "
        "one "
        "that is unknown or that this CPU lacks.");
    m.def(
        "best_isa", [] { return mllama::isa_name(mllama::best_isa()); },
        "The best instruction set of this CPU.");
    m.def("set_isa", &mllama::set_isa, py::arg("name"),
          "Use another instruction set from now on (for tests; MLLAMA_CPU_ISA does it for a whole "
          "process).\n\n"
          "Raises ValueError for an unknown name or one this CPU lacks.");
}
