// leaf_cuda._C: loads the operators, and tells how they were built.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "cpu/cpu_capability.h"

#define LEAF_STRING_(...) #__VA_ARGS__
#define LEAF_STRING(...) LEAF_STRING_(__VA_ARGS__)

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = TORCH_VERSION;
#if defined(__clang__)
    info["compiler"] = "Clang " __clang_version__;
#else
    info["compiler"] = "GCC " __VERSION__;
#endif
#if defined(LEAF_CUDA_VERSION)
    info["cuda"] = LEAF_STRING(LEAF_CUDA_VERSION);
    info["cuda_architectures"] = LEAF_STRING(LEAF_CUDA_ARCHITECTURES);
#else
    info["cuda"] = py::none();
    info["cuda_architectures"] = py::none();
#endif
    info["cpu_instruction_set"] = leaf_cuda::cpu::to_string(leaf_cuda::cpu::cpu_capability());
    return info;
  });
}
