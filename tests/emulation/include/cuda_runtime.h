// Stands in for the CUDA toolkit's <cuda_runtime.h>: with this folder on the include path, g++ and clang++ compile
// kernel source unchanged for the host. ../cuda_emulation.h launches the kernels.
//
// Undefined in CUDA but defined here: a shuffle from a lane outside the mask, and a read of shared memory that nobody
// has written, give 0xFF bytes, a NaN in every floating-point type.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// All threads of a block run on one OS thread, so "one per OS thread" is "one per block". A block-scope
// `extern __shared__` names a member of the enclosing namespace; cuda_emulation.h declares that array. Static shared
// memory (`__shared__ float x[32];` in a function) does not compile: it would escape the fill and the bounds check.
#define __shared__ __thread

using cudaStream_t = struct CUstream_st*;

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

// Set by the scheduler; kernels only read them.
extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_emulation {

enum class Operation { syncthreads, syncwarp, shfl, shfl_up, shfl_down, shfl_xor };

void syncthreads();
void syncwarp(unsigned mask);
// Replaces *value by that of the lane which operand and width select.
void shuffle(Operation operation, unsigned mask, void* value, std::size_t bytes, int operand, int width);

template <class T>
T shuffled(Operation operation, unsigned mask, T value, int operand, int width) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles no such type");
  shuffle(operation, mask, &value, sizeof value, operand, width);
  return value;
}

}  // namespace cuda_emulation

inline void __syncthreads() { cuda_emulation::syncthreads(); }
inline void __syncwarp(unsigned mask = 0xffffffff) { cuda_emulation::syncwarp(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  return cuda_emulation::shuffled(cuda_emulation::Operation::shfl, mask, value, lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return cuda_emulation::shuffled(cuda_emulation::Operation::shfl_up, mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return cuda_emulation::shuffled(cuda_emulation::Operation::shfl_down, mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  return cuda_emulation::shuffled(cuda_emulation::Operation::shfl_xor, mask, value, lane_mask, width);
}

// Not templates, so that they win against std::min under `using namespace std`.
inline int min(int a, int b) { return std::min(a, b); }
inline int64_t min(int64_t a, int64_t b) { return std::min(a, b); }
