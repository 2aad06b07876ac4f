#include "leaf_on_stream.cuh"

template void leaf_cuda::cuda::run_on<c10::Half>(cudaStream_t, int64_t, const Args&);
