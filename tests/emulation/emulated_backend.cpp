// The CUDA backend's kernels and launch planner on the host: does what leaf_on_stream.cuh and leaf_cuda.cpp do, but
// launches in the emulation instead of on a stream. Registers leaf_cuda_emulated's operators for CPU tensors.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "../../csrc/cuda/leaf_launch.cuh"
#include "../../csrc/leaf_ops.h"
#include "cuda_emulation.h"

namespace {

using namespace leaf_cuda;

// The schedule of the following launches, and how many multiprocessors the planner sees.
cuda_emulation::Schedule schedule{cuda_emulation::Schedule::ascending, cuda_emulation::Schedule::ascending, 0};
int64_t multiprocessors = 2;
int64_t launched = 0;

void configure(int64_t blocks, int64_t threads, int64_t seed, int64_t processors) {
  using Order = cuda_emulation::Schedule::Order;
  schedule = {static_cast<Order>(blocks), static_cast<Order>(threads), static_cast<uint64_t>(seed)};
  multiprocessors = processors;
}

const auto emulated_launch = [](auto kernel, dim3 grid, int threads, size_t shared_bytes, const auto&... args) {
  ++launched;
  cuda_emulation::launch(schedule, kernel, grid, dim3(threads), shared_bytes, args...);
};

// What a kernel does not write reads as NaN.
void poison(void* p, int64_t bytes) {
  if (p) std::memset(p, 0xff, bytes);
}

void run(const Args& a, const Tensor& u) {
  const auto is_input = [&](void* out) { return std::find(a.in, std::end(a.in), out) != std::end(a.in); };
  const int64_t element = c10::elementSize(a.dtype), line = a.line ? a.line : a.plan.period();
  for (int k = 0; k < kMaxOutputs; ++k) {
    const int64_t pitch = a.line ? a.out_pitch[k] : a.plan.pitch;
    for (int64_t i = 0; a.out[k] && !is_input(a.out[k]) && i < a.plan.numel(); i += line)
      poison(static_cast<char*>(a.out[k]) + i / line * pitch * element, line * element);
  }
  for (void* dp : a.dp) poison(dp, a.plan.count * c10::elementSize(a.dp_dtype));
  dispatch_dtype(a.dtype, [&](auto zero) {
    using S = decltype(zero);
    const cuda::LaunchPlan plan = cuda::plan_launch<S>(a, multiprocessors);
    const Tensor workspace = at::empty({plan.workspace_bytes}, u.options().dtype(at::kByte));
    poison(workspace.mutable_data_ptr(), plan.workspace_bytes);
    cuda::launch<S>(a, plan, workspace.mutable_data_ptr(), emulated_launch);
  });
}

}  // namespace

TORCH_LIBRARY(leaf_cuda_emulated, library) {
  define_operators(library);
  library.def("configure(int block_order, int thread_order, int seed, int multiprocessors) -> ()", configure);
  library.def("launches() -> int", [] { return launched; });
}

TORCH_LIBRARY_IMPL(leaf_cuda_emulated, CPU, library) { implement_operators<run>(library); }
