#include <c10/cuda/CUDAException.h>

#include "leaf_kernels.h"
#include "leaf_launch.cuh"

namespace leaf_cuda::cuda {
namespace {

struct OnStream {
  cudaStream_t stream;

  template <class Kernel, class... Args>
  void operator()(Kernel kernel, dim3 grid, int threads, size_t shared_bytes, const Args&... args) const {
    kernel<<<grid, threads, shared_bytes, stream>>>(args...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace

void run_on(cudaStream_t stream, int64_t multiprocessors, const Args& args,
            const std::function<void*(int64_t)>& allocate) {
  const LaunchPlan plan = plan_launch(args, multiprocessors);
  launch(args, plan, plan.workspace_bytes ? allocate(plan.workspace_bytes) : nullptr, OnStream{stream});
}

}  // namespace leaf_cuda::cuda
