// Shows that the emulation computes what CUDA defines and reports what CUDA does not.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda_emulation.h"
#include "memory_trace.h"

using cuda_emulation::launch;
using cuda_emulation::MemoryTrace;
using cuda_emulation::Schedule;

namespace leaf_cuda {

constexpr unsigned full_mask = 0xffffffff;

template <class T>
__device__ __forceinline__ T* shared() {
  extern __shared__ __align__(16) unsigned char leaf_smem[];
  return reinterpret_cast<T*>(leaf_smem);
}

__device__ __forceinline__ unsigned thread_in_block() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

// Sum of each block's elements; blockDim.x a power of two.
template <class T>
__global__ void __launch_bounds__(256) tree_sum(const T* __restrict__ x, T* __restrict__ sums) {
  T* partial = shared<T>();
  partial[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

// Each thread reads what a thread of another warp has written. What is written has been through a shuffle, and so,
// then, have the values that a missing barrier lets through.
__global__ void reverse(float* y, bool with_barrier) {
  float* s = shared<float>();
  s[threadIdx.x] = __shfl_xor_sync(full_mask, static_cast<float>(threadIdx.x ^ 1), 1);
  if (with_barrier) __syncthreads();
  y[threadIdx.x] = __shfl_sync(full_mask, s[blockDim.x - 1 - threadIdx.x], threadIdx.x);
}

template <class T>
__global__ void shuffles(T* y, int operand, int width) {
  const unsigned t = thread_in_block();
  const T value = static_cast<T>(t);
  y[4 * t] = __shfl_sync(full_mask, value, operand, width);
  y[4 * t + 1] = __shfl_up_sync(full_mask, value, operand, width);
  y[4 * t + 2] = __shfl_down_sync(full_mask, value, operand, width);
  y[4 * t + 3] = __shfl_xor_sync(full_mask, value, operand, width);
}

// The two halves of a warp diverge, each with its own mask and number of steps.
__global__ void half_warps(int* y) {
  const unsigned lane = threadIdx.x % warpSize;
  int v = 1;
  if (lane < 16) {
    for (int d = 8; d > 0; d /= 2) v += __shfl_down_sync(0x0000ffff, v, d, 16);
  } else {
    for (int i = 0; i < 3; ++i) __syncwarp(0xffff0000);
    v = __shfl_sync(0xffff0000, static_cast<int>(lane), 3);  // from a lane outside the mask
  }
  y[threadIdx.x] = v;
}

__global__ void count_visits(int* visits, int* order) {
  const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (thread_in_block() == 0) order[b] = visits[gridDim.x * gridDim.y * gridDim.z]++;
  ++visits[b];
}

__global__ void read_shared(unsigned* y, unsigned words) {
  for (unsigned i = 0; i < words; ++i) y[i] = shared<unsigned>()[i];
  y[words] = std::isnan(shared<float>()[0]) && std::isnan(shared<double>()[0]);
  for (unsigned i = 0; i < words; ++i) shared<unsigned>()[i] = 0;
}

struct Counted {
  explicit Counted(int& n) : count(n) { ++count; }
  ~Counted() { --count; }
  int& count;
};

enum class Fault {
  none,
  barrier_exited,
  barrier_against_warp,
  shuffle_exited,
  shuffle_at_barrier,
  masks_differ,
  own_lane,
  bad_width,
  exception,
  nested
};

__global__ void faulty(Fault fault, int* alive) {
  const Counted counted(*alive);
  const unsigned t = threadIdx.x;
  __syncthreads();
  switch (fault) {
    case Fault::none:
      break;
    case Fault::barrier_exited:
      if (t == 5) return;
      break;
    case Fault::barrier_against_warp:
      if (t < 32) __syncwarp(t < 31 ? full_mask : 1u << 31);
      break;
    case Fault::shuffle_exited:
      if (t == 35) return;
      __shfl_down_sync(full_mask, 1.0f, 1);
      break;
    case Fault::shuffle_at_barrier:
      if (t != 3) __shfl_sync(full_mask, 1.0, 0);
      break;
    case Fault::masks_differ:
      __syncwarp(t == 7 ? 0xff : full_mask);
      break;
    case Fault::own_lane:
      __shfl_xor_sync(0xfffffffe, 1, 1);
      break;
    case Fault::bad_width:
      __shfl_sync(full_mask, 1, 0, 12);
      break;
    case Fault::exception:
      if (t == 40) throw std::out_of_range("from thread 40");
      break;
    case Fault::nested:
      launch({Schedule::ascending, Schedule::ascending, 0}, faulty, 1, 1, 0, Fault::none, alive);
  }
  __syncthreads();
  if (fault != Fault::none) *alive = 1000;  // an abandoned thread went on
}

// Four elements per thread: vector loads, five shuffles per warp, one barrier; 256 threads.
__global__ void block_sum(const float4* __restrict__ x, float* __restrict__ sums) {
  const float4 v = x[blockIdx.x * blockDim.x + threadIdx.x];
  float sum = (v.x + v.y) + (v.z + v.w);
  for (int d = warpSize / 2; d > 0; d /= 2) sum += __shfl_down_sync(full_mask, sum, d);
  float* warps = shared<float>();
  if (threadIdx.x % warpSize == 0) warps[threadIdx.x / warpSize] = sum;
  __syncthreads();
  if (threadIdx.x == 0)
    for (unsigned w = 1; w < blockDim.x / warpSize; ++w) sum += warps[w];
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// y[t] = x[stride·t], through shared memory at multiples of the stride.
template <class T>
__global__ void strided(const T* x, T* y, unsigned stride) {
  T* const own = shared<T>() + stride * threadIdx.x;
  *own = x[stride * threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = *own;
}

#ifdef CUDA_EMULATION_ASAN
extern "C" int __asan_address_is_poisoned(const volatile void*);
__global__ void bounds(bool* ok, int bytes) {
  *ok = !__asan_address_is_poisoned(shared<char>() + bytes - 1) && __asan_address_is_poisoned(shared<char>() + bytes);
}
#endif

}  // namespace leaf_cuda

using namespace leaf_cuda;

namespace {

int passed = 0, failed = 0;

#define CHECK(name, condition) check(name, condition, #condition, __LINE__)

void check(const std::string& name, bool ok, const char* condition, int line) {
  ++(ok ? passed : failed);
  std::printf("%s  %s\n", ok ? "ok  " : "FAIL", name.c_str());
  if (!ok) std::printf("      line %d: %s\n", line, condition);
}

const Schedule::Order orders[] = {Schedule::ascending, Schedule::descending, Schedule::shuffled};
const char* const order_names[] = {"ascending", "descending", "shuffled"};
const Schedule in_order = {Schedule::ascending, Schedule::ascending, 0};

template <class... Launch>
std::string error_of(Launch... arguments) {
  try {
    launch(in_order, arguments...);
  } catch (const std::exception& e) {
    return e.what();
  }
  return "no error";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

void barriers() {
  std::vector<double> x(4 * 256);
  for (size_t i = 0; i < x.size(); ++i) x[i] = i % 97;
  std::vector<double> expected(4);
  for (size_t i = 0; i < x.size(); ++i) expected[i / 256] += x[i];
  for (auto blocks : orders)
    for (auto threads : orders) {
      std::vector<double> sums(4);
      launch({blocks, threads, 1}, tree_sum<double>, 4, 256, 256 * sizeof(double), x.data(), sums.data());
      CHECK(std::string("tree reduction, blocks ") + order_names[blocks] + ", threads " + order_names[threads],
            sums == expected);
    }
}

void races() {
  for (bool with_barrier : {true, false}) {
    std::vector<float> y[4];
    for (int i = 0; i < 4; ++i) {
      y[i].resize(256);
      const Schedule schedule = {Schedule::ascending, orders[i % 3], 7};  // the last as the first
      launch(schedule, leaf_cuda::reverse, 1, 256, 256 * sizeof(float), y[i].data(), with_barrier);
    }
    const auto same = [&](int i, int j) { return !std::memcmp(y[i].data(), y[j].data(), 256 * sizeof(float)); };
    CHECK("a schedule repeats bit by bit", same(0, 3));
    if (with_barrier)
      CHECK("with its barrier, every order gives the same", same(0, 1) && same(0, 2) && y[0][0] == 255);
    else
      CHECK("without its barrier, every order gives another result", !same(0, 1) && !same(0, 2) && !same(1, 2));
  }
}

// Checks what a launch of 256 threads moves, with a stride between their elements.
template <class T>
void traffic(unsigned stride, int64_t sectors_read, int64_t bank_times, int64_t least_times) {
  alignas(32) static T x[4096], y[256];
  MemoryTrace trace;
  const int read = trace.watch(x, 4096, sizeof(T)), written = trace.watch(y, 256, sizeof(T));
  trace.of_launch([&] { launch(in_order, strided<T>, 1, 256, 256 * stride * sizeof(T), x, y, stride); });
  const auto& [requests, times, least] = trace.of_shared();
  const std::string what = std::to_string(sizeof(T)) + " bytes, stride " + std::to_string(stride) + ": ";
  CHECK(what + "sectors of global memory",
        trace.of(read).read.count == 8 && trace.of(read).read.bytes == 256 * sizeof(T) &&
            trace.of(read).read.sectors == sectors_read && trace.of(read).write.count == 0 &&
            trace.of(written).read.count == 0 && trace.of(written).write.sectors == 8 * sizeof(T));
  CHECK(what + "banks of shared memory", requests == 16 && times == 2 * bank_times && least == 2 * least_times);
}

std::string race_in(const void* watched, int64_t n, size_t bytes, const std::function<void()>& launch) {
  MemoryTrace trace;
  trace.watch(watched, n, bytes);
  try {
    trace.of_launch(launch);
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "none";
}

void traces() {
  if (!cuda_emulation::is_traced) return;
  traffic<float>(1, 32, 8, 8);
  traffic<float>(2, 64, 16, 8);
  traffic<float>(3, 96, 8, 8);
  traffic<float>(8, 256, 64, 8);
  traffic<double>(1, 64, 16, 16);
  traffic<double>(2, 128, 32, 16);
  traffic<float4>(1, 128, 32, 32);
  traffic<float4>(2, 256, 64, 32);

  float y[256];
  for (bool with_barrier : {true, false}) {
    const std::string race =
        race_in(y, 256, 4, [&] { launch(in_order, leaf_cuda::reverse, 1, 256, 1024, y, with_barrier); });
    CHECK("a race in shared memory: " + race,
          race == (with_barrier ? "none"
                                : "data race in shared memory: thread (128,0,0) of block (0,0,0) writes what "
                                  "another read"));
  }
  int visits[25] = {}, order[24];
  const std::string race =
      race_in(visits, 25, 4, [&] { launch(in_order, count_visits, dim3(2, 3, 4), 1, 0, visits, order); });
  CHECK("a race in global memory: " + race,
        race == "data race in global memory: thread (0,0,0) of block (1,0,0) reads what another wrote");
}

// Lane l's source, in the words of the CUDA C++ Programming Guide, for operands below 32.
int source(int kind, int l, int operand, int width) {
  const int begin = l / width * width, in_group = l % width;
  if (kind == 0) return begin + operand % width;
  if (kind == 1) return in_group - operand >= 0 ? l - operand : l;
  if (kind == 2) return in_group + operand < width ? l + operand : l;
  return (l ^ operand) / width <= l / width ? l ^ operand : l;
}

template <class T>
bool shuffles_agree(dim3 block, T absent) {
  const int threads = block.x * block.y * block.z;
  for (auto order : orders)
    for (int width = 1; width <= 32; width *= 2)
      for (int operand = 0; operand < 32; ++operand) {
        std::vector<T> y(4 * threads);
        launch({order, order, 3}, leaf_cuda::shuffles<T>, 1, block, 0, y.data(), operand, width);
        for (int t = 0; t < threads; ++t)
          for (int kind = 0; kind < 4; ++kind) {
            const int from = t / 32 * 32 + source(kind, t % 32, operand, width);
            const T expected = from < threads ? static_cast<T>(from) : absent;
            if (std::memcmp(&y[4 * t + kind], &expected, sizeof expected)) return false;
          }
      }
  return true;
}

void warps() {
  double absent;
  std::memset(&absent, 0xff, sizeof absent);
  CHECK("shuffles of int, two warps", shuffles_agree<int>(64, -1));
  CHECK("shuffles of double, 4x4x4 threads", shuffles_agree<double>(dim3(4, 4, 4), absent));
  CHECK("shuffles of long long, partial last warp", shuffles_agree<long long>(45, -1));
  for (auto order : orders) {
    std::vector<int> y(64);
    launch({order, order, 5}, half_warps, 1, 64, 0, y.data());
    CHECK(std::string("half-warps apart, ") + order_names[order],
          y[0] == 16 && y[32] == 16 && y[16] == -1 && y[63] == -1);
  }
}

void grids() {
  std::vector<int> visited_at[3];
  for (auto order : orders) {
    std::vector<int> visits(25), &at = visited_at[order];
    at.resize(24);
    launch({order, order, 9}, count_visits, dim3(2, 3, 4), dim3(5, 2, 3), 0, visits.data(), at.data());
    CHECK(
        std::string("every thread of every block once, ") + order_names[order], visits == [] {
          std::vector<int> v(25, 30);
          v[24] = 24;
          return v;
        }());
  }
  bool as_named = true;
  for (int b = 0; b < 24; ++b) as_named &= visited_at[0][b] == b && visited_at[1][b] == 23 - b;
  CHECK("blocks ascending and descending", as_named);
  CHECK("blocks shuffled", visited_at[2] != visited_at[0] && visited_at[2] != visited_at[1]);
}

void shared_memory() {
  bool filled = true;
  for (int repeat = 0; repeat < 2; ++repeat) {
    std::vector<unsigned> y(101);
    launch(in_order, read_shared, 2, 1, 400, y.data(), 100u);
    for (int i = 0; i < 100; ++i) filled &= y[i] == 0xffffffff;
    filled &= y[100] == 1;
  }
  CHECK("shared memory starts as NaN in every block", filled);
#ifdef CUDA_EMULATION_ASAN
  for (int bytes : {100, 1024, CUDA_EMULATION_SHARED_LIMIT}) {
    bool ok = false;
    launch(in_order, bounds, 1, 1, bytes, &ok, bytes);
    CHECK("ASan bounds of " + std::to_string(bytes) + " bytes of shared memory", ok);
  }
#endif
}

void reported(const char* name, Fault fault, const std::string& message) {
  int alive = 0;
  const std::string error = error_of(faulty, 2, 64, 16, fault, &alive);
  CHECK(std::string(name) + " is reported: " + error, contains(error, message));
  CHECK("  all threads unwound, and the next launch works",
        alive == 0 && error_of(faulty, 2, 64, 16, Fault::none, &alive) == "no error" && alive == 0);
}

void errors() {
  reported("barrier against an exited thread", Fault::barrier_exited,
           "barrier divergence in block (0,0,0): thread (63,0,0) waits at __syncthreads, "
           "but thread (5,0,0) has exited");
  reported("barrier against a warp-level operation", Fault::barrier_against_warp,
           "barrier divergence in block (0,0,0): thread (0,0,0) waits at __syncwarp with mask 0xffffffff for lane 31, "
           "but thread (31,0,0) waits at __syncthreads");
  reported("shuffle with an exited lane", Fault::shuffle_exited,
           "warp deadlock in block (0,0,0): thread (32,0,0) waits at __shfl_down_sync of 4 bytes with mask 0xffffffff "
           "for lane 3, but thread (35,0,0) has exited");
  reported("shuffle with a lane at a barrier", Fault::shuffle_at_barrier,
           "barrier divergence in block (0,0,0): thread (0,0,0) waits at __shfl_sync of 8 bytes with mask 0xffffffff "
           "for lane 3, but thread (3,0,0) waits at __syncthreads");
  reported("difference of masks", Fault::masks_differ,
           "warp deadlock in block (0,0,0): thread (0,0,0) waits at __syncwarp with mask 0xffffffff for lane 7, "
           "but thread (7,0,0) waits at __syncwarp with mask 0x000000ff");
  reported("mask without the caller", Fault::own_lane,
           "thread (0,0,0) of block (0,0,0) calls __shfl_xor_sync of 4 bytes with mask 0xfffffffe, "
           "which lacks its own lane 0");
  reported("width", Fault::bad_width, "__shfl_sync: width 12");
  reported("exception of the kernel's own", Fault::exception, "from thread 40");
  reported("launch inside a kernel", Fault::nested, "launch inside a kernel");

  const auto with = [](dim3 grid, dim3 block, size_t bytes) {
    int alive = 0;
    return error_of(faulty, grid, block, bytes, Fault::none, &alive);
  };
  CHECK("grid limits", contains(with({0, 1, 1}, 1, 0), "grid (0,1,1)") && contains(with({1, 0, 1}, 1, 0), "grid") &&
                           contains(with({1u << 31, 1, 1}, 1, 0), "grid") &&
                           contains(with({1, 65536, 1}, 1, 0), "grid") && contains(with({1, 1, 65536}, 1, 0), "grid") &&
                           with({1, 1, 65535}, 1, 0) == "no error");
  CHECK("block limits", contains(with(1, {32, 33, 1}, 0), "more than 1024 threads") &&
                            contains(with(1, 0, 0), "block (0,1,1)") && contains(with(1, {1, 1, 65}, 0), "block") &&
                            with(1, {32, 32, 1}, 0) == "no error");
  CHECK("shared memory limit", contains(with(1, 1, CUDA_EMULATION_SHARED_LIMIT + 1), "dynamic shared memory") &&
                                   with(1, 1, CUDA_EMULATION_SHARED_LIMIT) == "no error");
  CHECK("barrier outside a kernel", [] {
    try {
      __syncthreads();
    } catch (const std::runtime_error& e) {
      return contains(e.what(), "__syncthreads outside a kernel");
    }
    return false;
  }());
}

void os_threads() {
  std::vector<double> x(64 * 128, 1), sums[2];
  std::vector<std::thread> workers;
  for (auto& s : sums)
    workers.emplace_back([&] {
      s.resize(64);
      for (int i = 0; i < 20; ++i) launch(in_order, tree_sum<double>, 64, 128, 1024, x.data(), s.data());
    });
  for (auto& w : workers) w.join();
  CHECK("two OS threads at once", sums[0] == std::vector<double>(64, 128) && sums[1] == sums[0]);
}

void speed() {
  constexpr int elements = 65536, block = 256, grid = elements / 4 / block;
  std::vector<float4> x(elements / 4, float4{1, 2, 3, 4});
  for (auto order : orders) {
    std::vector<float> sums(grid);
    double best = 1e9;
    for (int repeat = 0; repeat < 5; ++repeat) {
      const auto start = std::chrono::steady_clock::now();
      launch({order, order, 1}, block_sum, grid, block, 64, x.data(), sums.data());
      const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
      best = std::min(best, took.count());
    }
    std::printf("      65536 elements, %d threads, %s: %.2f ms\n", grid * block, order_names[order], best);
    CHECK(std::string("block sums, ") + order_names[order], sums == std::vector<float>(grid, 10 * block));
  }
}

}  // namespace

int main() {
  barriers();
  races();
  traces();
  warps();
  grids();
  shared_memory();
  errors();
  os_threads();
  speed();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
