// The line between the host compiler's file, which knows ATen, and nvcc's, which does not.
#pragma once

#include <cuda_runtime_api.h>

#include "../leaf_args.h"

namespace leaf_cuda::cuda {

int64_t workspace_bytes(int64_t multiprocessors, const Args& args);
void run_on(cudaStream_t stream, int64_t multiprocessors, const Args& args, void* workspace);

}  // namespace leaf_cuda::cuda
