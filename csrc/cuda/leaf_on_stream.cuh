// Launches on a CUDA stream, compiled by nvcc: one file per storage type, so that they compile in parallel.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>

#include "leaf_kernels.h"
#include "leaf_launch.cuh"

namespace leaf_cuda::cuda {

struct OnStream {
  cudaStream_t stream;

  template <class Kernel, class... Args>
  void operator()(Kernel kernel, dim3 grid, int threads, size_t shared_bytes, const Args&... args) const {
    kernel<<<grid, threads, shared_bytes, stream>>>(args...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

template <class S>
void run_on(cudaStream_t stream, int64_t multiprocessors, const Args& args) {
  const LaunchPlan plan = plan_launch<S>(args, multiprocessors);
  c10::DataPtr workspace;
  if (plan.workspace_bytes) workspace = c10::cuda::CUDACachingAllocator::get()->allocate(plan.workspace_bytes);
  launch<S>(args, plan, workspace.get(), OnStream{stream});
}

}  // namespace leaf_cuda::cuda
