// Runs CUDA kernels on the calling OS thread, to test their synchronisation as well as their arithmetic.
//
//   #include "cuda_emulation.h"
//   #include "some_kernel.cuh"
//   using cuda_emulation::Schedule;
//   cuda_emulation::launch({Schedule::descending, Schedule::shuffled, seed}, leaf_cuda::some_kernel<float>,
//                          grid, block, dynamic_shared_bytes, arguments...);
//
// Blocks run one after another. Of the threads of a block, the first one in the schedule's order that is not waiting
// runs, until it waits itself; `shuffled` draws a new order after each __syncthreads. So threads outrun each other as
// far as the kernel's barriers allow, and a missing barrier changes the result between orders.
//
// launch throws std::runtime_error where CUDA would hang, refuse the launch or leave the result undefined, and lets
// any exception out of the kernel; it unwinds the block's other threads first, so a barrier must not be called from a
// noexcept function. Stricter than hardware: neither __syncthreads nor a warp's mask may wait for a thread that has
// exited. (Lanes that a block's partial last warp lacks may be named.) A kernel that spins on another thread's write
// hangs.
//
// Several OS threads may launch at once; each has its own shared memory. Compile cuda_emulation.cpp along with the
// test; include/ must precede the CUDA toolkit on the include path. g++ needs -Wno-unknown-pragmas for #pragma unroll.
// Options, the same for every file:
//   -DCUDA_EMULATION_SHARED_LIMIT=bytes   above the default, the opt-in limit of the architecture
//   -DCUDA_EMULATION_UCONTEXT             the portable context switch on x86-64 too
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>

// Dynamic shared memory that a launch may use without an opt-in attribute. Compute capability 9.0 allows 227 KiB.
#ifndef CUDA_EMULATION_SHARED_LIMIT
#define CUDA_EMULATION_SHARED_LIMIT (48 * 1024)
#endif
static_assert(CUDA_EMULATION_SHARED_LIMIT <= 227 * 1024, "no architecture offers more shared memory");

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_EMULATION_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_EMULATION_ASAN
#endif
#endif

// What `extern __shared__ __align__(16) unsigned char leaf_smem[];` in a kernel of this namespace refers to. A kernel
// in another namespace, a nested or unnamed one included, fails to link.
namespace leaf_cuda {
extern __shared__ __align__(16) unsigned char leaf_smem[];
}

namespace cuda_emulation {

struct Schedule {
  enum Order { ascending, descending, shuffled };
  Order blocks, threads;
  std::uint64_t seed;
};

// Counts the starts of blocks and the completed __syncthreads of this OS thread's launches.
extern __thread std::uint64_t phase;

void run(const Schedule& schedule, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
         const std::function<void()>& thread_body);

template <class Kernel, class... Args>
void launch(const Schedule& schedule, Kernel kernel, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
            Args... args) {
  run(schedule, grid, block, dynamic_shared_bytes, [&] { kernel(args...); });
}

}  // namespace cuda_emulation
