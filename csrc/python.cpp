// leaf_cuda._C: loads the operators, tells how they were built, and calls two of them directly, because torch.ops, with
// its Python code and boxed arguments, takes a good part of a small tensor's forward.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/headeronly/version.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#if defined(LEAF_CUDA_ARCHITECTURES)  // defined by setup.py in a build with CUDA
#include <cuda_runtime_api.h>
#endif

#include "cpu/cpu_capability.h"
#include "leaf_ops.h"

#define LEAF_STRING_(...) #__VA_ARGS__
#define LEAF_STRING(...) LEAF_STRING_(__VA_ARGS__)

namespace py = pybind11;

namespace leaf_cuda {
namespace {

// Whether nothing but autograd and autocast stands between this thread's calls and the kernels: no mode, no transform,
// no tracer, all of which want to see a call as torch.ops makes it.
bool is_plain_thread() {
  const auto others = c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set;
  return (others - c10::autocast_dispatch_keyset).empty() && !at::impl::torch_function_mode_enabled();
}

bool has_kernel(const c10::OperatorHandle& operation, const Tensor& u) {
  return operation.hasKernelForDispatchKey(
      c10::toRuntimePerBackendFunctionalityKey(c10::DispatchKey::Dense, u.key_set().highestBackendKey()));
}

// A Python object as an operator's argument: exactly a Tensor or Parameter, or None where the argument is optional.
template <class T>
struct Argument;
template <>
struct Argument<const Tensor&> {
  static bool fits(PyObject* object) { return THPVariable_CheckExact(object); }
  static const Tensor& of(PyObject* object) { return THPVariable_Unpack(object); }
};
template <>
struct Argument<const OptionalTensor&> {
  static bool fits(PyObject* object) { return object == Py_None || THPVariable_CheckExact(object); }
  static OptionalTensor of(PyObject* object) {
    return object == Py_None ? OptionalTensor() : THPVariable_Unpack(object);
  }
};

// The operator as a Python function of its positional arguments. Returns NotImplemented where an argument or the thread
// is not plain, or the first argument's device has no kernel.
template <auto f, const char* const& name, class F = decltype(f)>
struct Plain;
template <auto f, const char* const& name, class... Arguments>
struct Plain<f, name, Tensor (*)(Run, Arguments...)> {
  static PyObject* call(PyObject*, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    static const auto operation = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
    return [&]<size_t... k>(std::index_sequence<k...>) -> PyObject* {
      if (count != sizeof...(Arguments) || !(Argument<Arguments>::fits(objects[k]) && ...) || !is_plain_thread() ||
          !has_kernel(operation, THPVariable_Unpack(objects[0])))
        Py_RETURN_NOTIMPLEMENTED;
      // Held, since another thread may give the objects other tensors.
      const std::tuple<std::decay_t<Arguments>...> held(Argument<Arguments>::of(objects[k])...);
      Tensor y;
      {
        const py::gil_scoped_release no_gil;
        y = Dispatched<f>{name}(std::get<k>(held)...);
      }
      return THPVariable_Wrap(std::move(y));
    }(std::index_sequence_for<Arguments...>());
    END_HANDLE_TH_ERRORS
  }
};

template <auto f, const char* const& name>
PyMethodDef plain(const char* python_name) {
  return {python_name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(Plain<f, name>::call)), METH_FASTCALL,
          "The operator on plain tensors; NotImplemented where torch.ops must be called."};
}

PyMethodDef functions[] = {
    plain<leaf_forward, kForward>("leaf_forward"), plain<leaf_glu_forward, kGluForward>("leaf_glu_forward"), {}};

}  // namespace
}  // namespace leaf_cuda

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  if (PyModule_AddFunctions(m.ptr(), leaf_cuda::functions) != 0) throw py::error_already_set();
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = TORCH_VERSION;
#if defined(__clang__)
    info["compiler"] = "Clang " __clang_version__;
#else
    info["compiler"] = "GCC " __VERSION__;
#endif
#if defined(_OPENMP)
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
#if defined(LEAF_CUDA_ARCHITECTURES)
    info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    info["cuda_architectures"] = LEAF_STRING(LEAF_CUDA_ARCHITECTURES);
#else
    info["cuda"] = py::none();
    info["cuda_architectures"] = py::none();
#endif
    info["cpu_instruction_set"] = leaf_cuda::cpu::to_string(leaf_cuda::cpu::cpu_capability());
    return info;
  });
}
