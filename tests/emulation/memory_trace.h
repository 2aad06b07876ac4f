// Counts what the threads of an emulated kernel read and write, warp by warp as a GPU moves it, and finds data races.
//
//   cuda_emulation::MemoryTrace trace;
//   const int u = trace.watch(u_data, n, sizeof(float));
//   trace.of_launch([&] { cuda_emulation::launch(schedule, kernel, grid, block, shared_bytes, arguments...); });
//   trace.of(u).read.sectors
//
// The kernels' file is compiled with -fsanitize=thread, so that the compiler calls __tsan_read4 and the like at each
// access. memory_trace.cpp has these functions, not the sanitizer's library: the flag is for compiling that file alone,
// and not for linking.
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

  // A request is what a warp accesses of one buffer by one instruction: its threads' first accesses at a place in the
  // code since the last barrier, their second, ... Where the threads of a warp take different turns of a loop (it is
  // not unrolled here), these may not be what a GPU accesses at once; bytes and races are right all the same.
  struct Requests {
    int64_t count = 0;
    int64_t bytes = 0;    // over the threads
    int64_t sectors = 0;  // of 32 bytes, that a request needs from global memory
  };
  struct Traffic {
    Requests read, write;
  };
  // Of shared memory, whose 32 banks give a word of 4 bytes each at a time. A request takes as many times as the
  // busiest bank has words in it; those of 8 and of 16 bytes go by half and by quarter warps. `least`: with no bank
  // conflict.
  struct SharedTraffic {
    int64_t requests = 0, times = 0, least = 0;
  };

  // Global memory to watch: n elements, each of which is read and written as a whole. Returns its number.
  int watch(const void* begin, int64_t n, size_t element_bytes);

  // Calls `launch`, of one kernel. Throws std::runtime_error where two threads access the same memory and one of them
  // writes: an element of global memory in the same launch, a word of shared memory with no __syncthreads between.
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
  // The threads that have accessed an element or a word since a launch or a barrier, `since` in number; two readers are
  // as many as matter.
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
    uint64_t request;  // warp, place, which in turn: equal in the threads of one
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
  std::vector<Users> shared_users;  // of each word
  uint64_t launches = 0;
  std::string race;                                   // the first, in words
  std::map<std::pair<const void*, int>, int> places;  // in the code, of each buffer
  // Since the last barrier:
  uint64_t in_phase = 0;
  std::vector<Access> accesses;
  std::unordered_map<uint64_t, int> turns;  // of a thread at a place
};

}  // namespace cuda_emulation
