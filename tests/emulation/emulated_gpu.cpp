// What runs on the emulated runtime's devices: the extension's kernels, in the emulation, and PyTorch's own operators,
// by the CPU's kernels on the same memory. What lies around the kernels is the CUDA build's own: operators, launches,
// streams, device guards, the caching allocator, autograd's threads.
//
// Captured in a CUDA graph are the extension's kernels alone; PyTorch's operators run once, at the capture.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../../csrc/cuda/leaf_launch.cuh"
#include "cuda_emulation.h"
#include "emulated_runtime.h"

namespace {

using namespace leaf_cuda;
using c10::DispatchKey;
using c10::IValue;
using torch::jit::Stack;

c10::DeviceIndex current_device() { return c10::impl::VirtualGuardImpl(at::kCUDA).getDevice().index(); }

// ---- the extension's kernels ----

std::atomic<int64_t> launched{0};

bool is_mapped(void* p) {
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  unsigned char resident;
  return !mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p) / page * page), 1, &resident);
}

// Throws if a word of a kernel's argument points into another device's memory, or the host's.
template <class P>
void check_device(const P& argument) {
  for (size_t at = 0; at + sizeof(void*) <= sizeof argument; at += sizeof(void*)) {
    void* p;
    std::memcpy(&p, reinterpret_cast<const char*>(&argument) + at, sizeof p);
    const int device = cuda_emulation::device_of(p);
    if (device >= 0 && device != current_device())
      throw std::runtime_error("a kernel on device " + std::to_string(current_device()) +
                               " is given memory of device " + std::to_string(device));
    if (device < 0 && is_mapped(p)) throw std::runtime_error("a kernel is given memory of the host");
  }
}

// In place of a launch: makes the kernel known to the runtime.
const auto add_kernel = []<class... Ps>(void (*kernel)(Ps...), const auto&...) {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(kernel), &info) || !info.dli_sname) throw std::runtime_error("no symbol");
  cuda_emulation::add_emulated_kernel(
      info.dli_sname, [kernel](void** arguments, const dim3& grid, const dim3& block, size_t shared_bytes) {
        return [&]<size_t... I>(std::index_sequence<I...>) -> cuda_emulation::Work {
          const std::tuple<std::remove_const_t<Ps>...> values(*static_cast<Ps*>(arguments[I])...);
          (check_device(std::get<I>(values)), ...);
          ++launched;
          return [=] {
            using Order = cuda_emulation::Schedule::Order;
            cuda_emulation::launch({Order::shuffled, Order::shuffled, 0}, kernel, grid, block, shared_bytes,
                                   std::get<I>(values)...);
          };
        }(std::index_sequence_for<Ps...>());
      });
};

template <class S>
void add_kernels() {
  Operations::for_each([](auto op) {
    Args args{};
    args.operation = decltype(op)::operation;
    cuda::LaunchPlan plan{};
    plan.workspace_bytes = 1;  // so that there is something to finish
    for (const bool vector : {false, true})
      for (const bool by_rows : {false, true}) {
        plan.vector = vector;
        plan.by_rows = by_rows;
        cuda::launch<S>(args, plan, nullptr, add_kernel);
      }
  });
}

// ---- PyTorch's operators ----

// Shares t's memory.
at::Tensor on_host(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  return at::from_blob(t.mutable_data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU).requires_grad(false));
}

void synchronize(at::Device device) {
  const c10::impl::VirtualGuardImpl cuda(at::kCUDA);
  cuda_emulation::finish_before_host(device.index(), cuda.getStream(device).native_handle());
}

// Synchronises after allocating: the memory may have been freed while a kernel that uses it was waiting.
void write_on_device(const at::Tensor& to, const at::Tensor& values) {
  synchronize(to.device());
  on_host(to).copy_(values);
}

at::Tensor on_device(const at::Tensor& t, at::Device device) {
  if (!t.defined() || t.is_cuda()) return t;
  at::Tensor result = at::empty_strided(t.sizes(), t.strides(), t.options().device(device));
  write_on_device(result, t);
  return result;
}

// The same value with f of each tensor in it.
template <class F>
IValue map_tensors(const IValue& value, const F& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> list = value.toTensorVector();
    for (at::Tensor& t : list) t = f(t);
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
      list.push_back(t ? std::optional(f(*t)) : std::nullopt);
    return list;
  }
  return value;
}

void run_on_host(const c10::OperatorHandle& op, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t count = schema.arguments().size();
  const std::vector<IValue> arguments(stack->end() - count, stack->end());
  at::Device device(at::kCUDA, current_device());
  std::set<at::DeviceIndex> devices;
  const auto see = [&](const at::Tensor& t) {
    if (t.defined() && t.is_cuda()) devices.insert((device = t.device()).index());
    return t;
  };
  for (auto argument = arguments.rbegin(); argument != arguments.rend(); ++argument) map_tensors(*argument, see);
  for (size_t k = 0; k < count; ++k) {
    IValue& value = stack->end()[-static_cast<int64_t>(count - k)];
    // An empty `out` may be resized, which memory of another's cannot be.
    const bool resizable = schema.arguments()[k].is_out() && value.isTensor() && value.toTensor().numel() == 0;
    if (value.isDevice() && value.toDevice().is_cuda()) {
      if (value.toDevice().has_index()) device = value.toDevice();
      value = at::Device(at::kCPU);
    } else if (value.isGenerator()) {
      TORCH_CHECK(false, schema.operator_name(), ": an emulated GPU has no generators");
    } else {
      value = map_tensors(value, [&](const at::Tensor& t) {
        return resizable ? at::empty(t.sizes(), t.options().device(at::kCPU)) : on_host(t);
      });
    }
  }
  // Held, since boxed calls of several `out` return references into arguments that they have dropped.
  const std::vector<IValue> on_hosts(stack->end() - count, stack->end());
  for (const at::DeviceIndex d : devices) synchronize({at::kCUDA, d});
  op.callBoxed(stack);
  for (size_t r = 0; r < schema.returns().size(); ++r) {
    IValue& result = stack->end()[-static_cast<int64_t>(schema.returns().size() - r)];
    const c10::AliasInfo* written = schema.returns()[r].alias_info();
    if (!written) {
      result = map_tensors(result, [&](const at::Tensor& t) { return on_device(t, device); });
      continue;
    }
    for (size_t k = 0; k < count; ++k) {
      const c10::AliasInfo* own = schema.arguments()[k].alias_info();
      if (!own || *own != *written) continue;
      result = arguments[k];
      if (!result.isTensor()) continue;
      const at::Tensor &to = result.toTensor(), &from = on_hosts[k].toTensor();
      if (to.sizes() != from.sizes()) write_on_device(to.resize_(from.sizes()), from);
    }
  }
}

bool is_view(const c10::FunctionSchema& schema) {
  const auto is_alias = [](const c10::Argument& r) { return r.alias_info() && !r.alias_info()->isWrite(); };
  return std::any_of(schema.returns().begin(), schema.returns().end(), is_alias);
}

// Whether PyTorch would launch a kernel for it, or call a library.
bool computes(const c10::OperatorHandle& op) {
  // Composites that choose between CUDA's libraries, or that the dispatcher does not see inside of.
  static const std::set<std::string> also = {"aten::copy_", "aten::convolution", "aten::convolution_backward"};
  static const std::set<std::string> not_these = {
      "aten::empty",     "aten::empty_strided", "aten::set_",        "aten::resize_",
      "aten::is_set_to", "aten::record_stream", "aten::_pin_memory", "aten::_efficientzerotensor"};
  const std::string& name = op.operator_name().name;
  return name.starts_with("aten::") && op.hasSchema() && !is_view(op.schema()) && !not_these.contains(name) &&
         (also.contains(name) || op.hasKernelForDispatchKey(DispatchKey::CUDA));
}

TORCH_LIBRARY(emulated_gpu, library) {
  library.def("launches() -> int", [] { return launched.load(); });
}

[[maybe_unused]] const bool added = [] {
  add_kernels<float>();
  add_kernels<double>();
  add_kernels<c10::Half>();
  add_kernels<c10::BFloat16>();
  c10::Dispatcher& dispatcher = c10::Dispatcher::singleton();
  static std::vector<c10::RegistrationHandleRAII> kept;
  for (const c10::OperatorName& name : dispatcher.getAllOpNames())
    if (const auto op = dispatcher.findOp(name); op && computes(*op))
      kept.push_back(dispatcher.registerImpl(name, DispatchKey::CUDA,
                                             c10::KernelFunction::makeFromBoxedFunction<run_on_host>(), {}, nullptr,
                                             "an emulated GPU"));
  return true;
}();

}  // namespace
