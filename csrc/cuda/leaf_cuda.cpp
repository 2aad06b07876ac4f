// The CUDA backend: device and stream for the kernels of leaf_kernels_*.cu.
#include "leaf_kernels.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../leaf_ops.h"

namespace leaf_cuda::cuda {
namespace {

int64_t multiprocessors_of_current_device() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

void run(const Args& args, const Tensor& u) {
  const c10::cuda::CUDAGuard guard(u.device());
  dispatch_dtype(args.dtype, [&](auto zero) {
    run_on<decltype(zero)>(c10::cuda::getCurrentCUDAStream(), multiprocessors_of_current_device(), args);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(leaf_cuda, CUDA, library) {
  if (is_unregistered(c10::DispatchKey::CUDA)) implement_operators<run>(library);
}

}  // namespace leaf_cuda::cuda
