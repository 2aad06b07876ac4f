// Stands in for the CUDA toolkit's <cuda_runtime.h>: with this folder on the include path, g++ and clang++ compile
// kernel source unchanged for the host. ../cuda_emulation.h launches the kernels.
//
// Undefined in CUDA, definite here: a shuffle from a lane outside the mask, and shared memory nobody has written,
// read as 0xFF bytes, a NaN in every floating-point type.
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

// clang-format off
struct uint3 { unsigned x, y, z; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) double2 { double x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
// clang-format on

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

// The cache hints change no result.
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, std::common_type_t<T> value) {
  *address = value;
}

// The fast approximations are the accurate functions here. noexcept because glibc declares some of these names too.
inline float __expf(float x) noexcept { return expf(x); }
inline float __fdividef(float x, float y) noexcept { return x / y; }
inline float rsqrtf(float x) noexcept { return 1 / sqrtf(x); }
inline float __frcp_rn(float x) noexcept { return 1 / x; }
inline float __fmaf_rn(float x, float y, float z) noexcept { return fmaf(x, y, z); }

// volatile keeps the host compiler from fusing them into a multiply-add, as their contract demands.
inline float __fmul_rn(float x, float y) noexcept {
  const volatile float product = x * y;
  return product;
}
inline float __fadd_rn(float x, float y) noexcept {
  const volatile float sum = x + y;
  return sum;
}

// Not templates, so that they win against std::min and std::max under `using namespace std`.
#define CUDA_EMULATION_MIN_MAX(T, A, B, less, greater) \
  inline T min(A a, B b) { return less(a, b); }        \
  inline T max(A a, B b) { return greater(a, b); }
CUDA_EMULATION_MIN_MAX(int, int, int, std::min<int>, std::max<int>)
CUDA_EMULATION_MIN_MAX(unsigned, unsigned, unsigned, std::min<unsigned>, std::max<unsigned>)
CUDA_EMULATION_MIN_MAX(unsigned, int, unsigned, std::min<unsigned>, std::max<unsigned>)
CUDA_EMULATION_MIN_MAX(unsigned, unsigned, int, std::min<unsigned>, std::max<unsigned>)
CUDA_EMULATION_MIN_MAX(long, long, long, std::min<long>, std::max<long>)
CUDA_EMULATION_MIN_MAX(unsigned long, unsigned long, unsigned long, std::min<unsigned long>, std::max<unsigned long>)
CUDA_EMULATION_MIN_MAX(long long, long long, long long, std::min<long long>, std::max<long long>)
CUDA_EMULATION_MIN_MAX(unsigned long long, unsigned long long, unsigned long long, std::min<unsigned long long>,
                       std::max<unsigned long long>)
CUDA_EMULATION_MIN_MAX(float, float, float, fminf, fmaxf)
CUDA_EMULATION_MIN_MAX(double, double, double, fmin, fmax)
CUDA_EMULATION_MIN_MAX(double, float, double, fmin, fmax)
CUDA_EMULATION_MIN_MAX(double, double, float, fmin, fmax)
#undef CUDA_EMULATION_MIN_MAX
