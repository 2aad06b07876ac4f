// The line between the host compiler's file, which knows ATen, and nvcc's, which does not.
#pragma once

#include <cuda_runtime_api.h>

#include "../leaf_args.h"

namespace leaf_cuda::cuda {

void forward_on(cudaStream_t stream, int64_t multiprocessors, const ForwardArgs& args);

int64_t backward_workspace_bytes(int64_t multiprocessors, const BackwardArgs& args);
void backward_on(cudaStream_t stream, int64_t multiprocessors, const BackwardArgs& args, void* workspace);

}  // namespace leaf_cuda::cuda
