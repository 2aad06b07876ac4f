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

int64_t workspace_bytes(int64_t multiprocessors, const Args& args) {
  return plan_launch(args, multiprocessors).workspace_bytes;
}

void run_on(cudaStream_t stream, int64_t multiprocessors, const Args& args, void* workspace) {
  launch(args, plan_launch(args, multiprocessors), workspace, OnStream{stream});
}

}  // namespace leaf_cuda::cuda
