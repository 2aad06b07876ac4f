// Counts what the threads of an emulated kernel read and write, grouped by warp as on a GPU, and finds data races.
//
//   cuda_emulation::MemoryTrace trace;
//   const int u = trace.watch(u_data, n, sizeof(float));
//   trace.of_launch([&] { cuda_emulation::launch(schedule, kernel, grid, block, shared_bytes, arguments...); });
//   trace.of(u).read.sectors
//
// The kernels' file is compiled with -fsanitize=thread, so that the compiler calls __tsan_read4 and the like at each
// access. memory_trace.cpp defines these in place of the sanitizer's library: compile that file alone with the flag,
// and do not link with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_emulation.h"

namespace cuda_emulation {

#if defined(__SANITIZE_THREAD__)
constexpr bool is_traced = true;
#else
constexpr bool is_traced = false;
#endif

class MemoryTrace {
 public:
  MemoryTrace() = default;
  ~MemoryTrace() {
    if (active == this) active = nullptr;  // a launch that threw
  }
  MemoryTrace(const MemoryTrace&) = delete;
  MemoryTrace& operator=(const MemoryTrace&) = delete;

  // A request is what a warp accesses of one buffer by one instruction: its threads' first accesses from a place in the
  // code since the last barrier, their second ones, and so on. Where threads of a warp are in different iterations of a
  // loop (loops are not unrolled here), a GPU may combine other accesses; bytes and races are right all the same.
  struct Requests {
    int64_t count = 0;
    int64_t bytes = 0;    // in all threads
    int64_t sectors = 0;  // of 32 bytes of global memory, that requests touch
  };
  struct Traffic {
    Requests read, write;
  };
  // Shared memory has 32 banks, each of which gives one 4-byte word at a time: a request takes as many `times` as its
  // busiest bank has words. Requests of 8 and of 16 bytes per lane go by half and by quarter warps. `least`: the times
  // without bank conflicts.
  struct SharedTraffic {
    int64_t requests = 0, times = 0, least = 0;
  };

  // Watches n elements of global memory, each of which is read and written as a whole. Returns the buffer's number.
  int watch(const void* begin, int64_t n, size_t element_bytes);

  // Calls `launch`, which launches one kernel. Throws std::runtime_error if two threads access the same memory and one
  // of them writes: an element of global memory in the launch, a word of shared memory with no __syncthreads between.
  template <class Launch>
  void of_launch(const Launch& launch) {
    begin_launch();
    launch();
    end_launch();
  }

  const Traffic& of(int buffer) const { return buffers[buffer].traffic; }
  const SharedTraffic& of_shared() const { return shared_traffic; }

  // For the compiler's calls.
  static void access(const void* at, int bytes, bool is_write, const void* site) {
    if (active) active->record(reinterpret_cast<uintptr_t>(at), bytes, is_write, site);
  }

 private:
  // The threads that have accessed an element since the launch, or a word since the barrier, that `since` numbers. Two
  // readers are enough to find every race.
  struct Users {
    uint64_t since = 0;
    int64_t writer = -1, reader = -1, other_reader = -1;
  };
  struct Buffer {
    uintptr_t begin, end;
    size_t element_bytes;
    Traffic traffic;
    std::vector<Users> users;
  };
  struct Access {
    uint64_t request;  // warp, place and turn: equal for all threads of a request
    unsigned lane;
    uintptr_t at;
    int bytes, buffer;  // buffer: -1 for shared memory
    bool is_write;
  };

  void begin_launch();
  void end_launch();
  void record(uintptr_t at, int bytes, bool is_write, const void* site);
  void check_race(Users& users, uint64_t since, int64_t thread, bool is_write, const char* memory);
  void end_phase();
  void count_request(const Access* first, const Access* last);

  static inline thread_local MemoryTrace* active = nullptr;
  std::vector<Buffer> buffers;
  SharedTraffic shared_traffic;
  std::vector<Users> shared_users;  // for each word
  uint64_t launches = 0;
  std::string race;                                   // a description of the first one
  std::map<std::pair<const void*, int>, int> places;  // place in the code and buffer → number
  // Since the last barrier:
  uint64_t in_phase = 0;
  std::vector<Access> accesses;
  std::unordered_map<uint64_t, int> turns;  // thread and place → accesses so far
};

}  // namespace cuda_emulation
