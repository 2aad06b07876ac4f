#include "leaf_on_stream.cuh"

template void leaf_cuda::cuda::run_on<c10::BFloat16>(cudaStream_t, int64_t, const Args&);
