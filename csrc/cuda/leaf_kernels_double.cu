#include "leaf_on_stream.cuh"

template void leaf_cuda::cuda::run_on<double>(cudaStream_t, int64_t, const Args&);
