// The line between the host compiler's file, which knows ATen, and nvcc's (leaf_kernels_*.cu), which do not.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#include "../leaf_args.h"

namespace leaf_cuda::cuda {

// allocate(bytes): the workspace, on the device; called where one is needed.
using Allocate = std::function<void*(int64_t)>;

// S: the storage type, args.dtype's.
template <class S>
void run_on(cudaStream_t stream, int64_t multiprocessors, const Args& args, const Allocate& allocate);

}  // namespace leaf_cuda::cuda
