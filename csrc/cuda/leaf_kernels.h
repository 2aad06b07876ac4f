// The interface between leaf_cuda.cpp, compiled with ATen by the host compiler, and leaf_kernels_*.cu, without it by
// nvcc.
#pragma once

#include <cuda_runtime_api.h>

#include "../leaf_args.h"

namespace leaf_cuda::cuda {

// S: the storage type, args.dtype's. stream: the current one, of the current device.
template <class S>
void run_on(cudaStream_t stream, int64_t multiprocessors, const Args& args);

}  // namespace leaf_cuda::cuda
