#include "cuda_emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef CUDA_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes)
#endif

#if !defined(__x86_64__) && !defined(CUDA_EMULATION_UCONTEXT)
#define CUDA_EMULATION_UCONTEXT
#endif
#ifdef CUDA_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace leaf_cuda {
// The excess is never addressable, so that ASan sees an overrun of a launch that uses the whole limit.
__shared__ __align__(16) unsigned char leaf_smem[CUDA_EMULATION_SHARED_LIMIT + 1024];
}  // namespace leaf_cuda

#ifndef CUDA_EMULATION_UCONTEXT
// Saves the callee-saved registers on the stack and its pointer in *from, then does the reverse with `to`. swapcontext
// would add a system call, for a signal mask that never changes here.
extern "C" void cuda_emulation_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .globl cuda_emulation_switch
  .hidden cuda_emulation_switch
  .type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_emulation_switch, . - cuda_emulation_switch
  .popsection
)");
#endif

namespace cuda_emulation {

__thread std::uint64_t phase = 0;

namespace {

#ifdef CUDA_EMULATION_ASAN
constexpr std::size_t stack_bytes = 256 * 1024;
#else
constexpr std::size_t stack_bytes = 64 * 1024;
#endif
constexpr std::size_t guard_bytes = 64 * 1024;  // a multiple of every page size in use

// A stack that the OS thread can leave and come back to: a fiber's, or the one that launch was called on.
struct Stack {
#ifdef CUDA_EMULATION_UCONTEXT
  ucontext_t context;
#else
  void* pointer = nullptr;
#endif
  // For ASan:
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  std::size_t bytes = 0;
};

void after_switch([[maybe_unused]] Stack& to, [[maybe_unused]] Stack& from) {
#ifdef CUDA_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(to.fake_stack, &from.bottom, &from.bytes);
#endif
}

// Returns once `to` switches back; both must still exist then.
void switch_stack(Stack& from, Stack& to) {
#ifdef CUDA_EMULATION_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
#ifdef CUDA_EMULATION_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  cuda_emulation_switch(&from.pointer, to.pointer);
#endif
  after_switch(from, to);
}

[[noreturn]] void thread_main();

// A CUDA thread and the fiber that runs it. The fiber later runs threads of other blocks.
struct Thread {
  enum State { ready, waiting, exited };

  Thread() {
    mapping = mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapping, guard_bytes, PROT_NONE);
    stack.bottom = static_cast<char*>(mapping) + guard_bytes;
    stack.bytes = stack_bytes;
#ifdef CUDA_EMULATION_UCONTEXT
    getcontext(&stack.context);
    stack.context.uc_stack.ss_sp = const_cast<void*>(stack.bottom);
    stack.context.uc_stack.ss_size = stack_bytes;
    makecontext(&stack.context, thread_main, 0);
#else
    // As cuda_emulation_switch leaves a stack: six registers, the address it returns to, and above it the null that
    // thread_main takes for its own return address.
    void** top = static_cast<void**>(mapping) + (guard_bytes + stack_bytes) / sizeof(void*);
    top[-2] = reinterpret_cast<void*>(thread_main);
    stack.pointer = top - 8;
#endif
  }
  ~Thread() {
    ASAN_UNPOISON_MEMORY_REGION(stack.bottom, stack.bytes);
    munmap(mapping, guard_bytes + stack_bytes);
  }
  Thread(const Thread&) = delete;
  Thread& operator=(const Thread&) = delete;

  Stack stack;
  void* mapping;
  uint3 index;
  unsigned rank;  // position in the order of the phase
  State state;

  // While waiting: the operation waited at; for a shuffle, the value given and, once ready again, the value received.
  Operation operation;
  unsigned mask;
  std::size_t bytes;
  unsigned source;
  unsigned char value[8];

  bool waits_with(const Thread& other) const {
    return state == waiting && operation == other.operation && mask == other.mask && bytes == other.bytes;
  }
};

thread_local std::vector<std::unique_ptr<Thread>> pool;  // grows to the largest block so far
thread_local Stack scheduler;                            // outlives a launch, because parked fibers refer to it
__thread class Launch* active = nullptr;

struct Abandoned {};  // thrown in the threads that an error elsewhere leaves waiting

const char* name(Operation operation) {
  constexpr const char* names[] = {"__syncthreads",  "__syncwarp",       "__shfl_sync",
                                   "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  return names[static_cast<int>(operation)];
}

std::string text(uint3 v) {
  char digits[40];
  std::snprintf(digits, sizeof(digits), "(%u,%u,%u)", v.x, v.y, v.z);
  return digits;
}

std::string text(Operation operation, unsigned mask, std::size_t bytes) {
  if (operation == Operation::syncthreads) return name(operation);
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return name(operation) + (bytes ? " of " + std::to_string(bytes) + " bytes" : std::string()) + " with mask " + digits;
}

class Launch {
 public:
  Launch(const Schedule& s, dim3 block, std::size_t dynamic_shared_bytes, const std::function<void()>& thread_body)
      : body(thread_body),
        schedule(s),
        shared_bytes(dynamic_shared_bytes),
        order(block.x * block.y * block.z),
        engine(s.seed) {
    while (threads.size() < order.size()) threads.push_back(std::make_unique<Thread>());
    std::iota(order.begin(), order.end(), 0);
    if (schedule.threads == Schedule::descending) std::reverse(order.begin(), order.end());
    for (unsigned i = 0; i < order.size(); ++i)
      threads[i]->index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    blockDim = block;
    ASAN_POISON_MEMORY_REGION(leaf_cuda::leaf_smem + shared_bytes, sizeof leaf_cuda::leaf_smem - shared_bytes);
    active = this;
  }
  ~Launch() {
    ASAN_UNPOISON_MEMORY_REGION(leaf_cuda::leaf_smem, sizeof leaf_cuda::leaf_smem);
    active = nullptr;
  }

  void run_grid(dim3 grid) {
    gridDim = grid;
    const std::uint64_t count = std::uint64_t{grid.x} * grid.y * grid.z;
    std::vector<std::uint64_t> shuffled(schedule.blocks == Schedule::shuffled ? count : 0);
    std::iota(shuffled.begin(), shuffled.end(), 0);
    std::shuffle(shuffled.begin(), shuffled.end(), engine);
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::uint64_t b = schedule.blocks == Schedule::ascending    ? i
                              : schedule.blocks == Schedule::descending ? count - 1 - i
                                                                        : shuffled[i];
      blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
      run_block();
    }
  }

  // For the kernel's threads:

  void run_thread() {
    try {
      if (!abandoning) body();
    } catch (const Abandoned&) {
    } catch (...) {
      if (!error) error = std::current_exception();
    }
    threads[current]->state = Thread::exited;
  }

  void suspend() {
    switch_stack(current_stack(), scheduler);
    if (abandoning) throw Abandoned{};
  }

  void wait_for_block() {
    Thread& self = *threads[current];
    self.state = Thread::waiting;
    self.operation = Operation::syncthreads;
    suspend();
  }

  void wait_for_warp(Operation operation, unsigned mask, void* value, std::size_t bytes, int operand, int width) {
    Thread& self = *threads[current];
    const unsigned lane = current % warpSize;
    if (!(mask >> lane & 1))
      throw std::runtime_error("thread " + text(threadIdx) + " of block " + text(blockIdx) + " calls " +
                               text(operation, mask, bytes) + ", which lacks its own lane " + std::to_string(lane));
    self.source = source_lane(operation, lane, operand, width);
    self.operation = operation;
    self.mask = mask;
    self.bytes = bytes;
    self.state = Thread::waiting;
    if (bytes) std::memcpy(self.value, value, bytes);
    exchange_if_complete(self);
    suspend();
    if (bytes) std::memcpy(value, self.value, bytes);
  }

  Stack& current_stack() { return threads[current]->stack; }

 private:
  void run_block() {
    std::memset(leaf_cuda::leaf_smem, 0xff, shared_bytes);
    begin_phase();
    for (;;) {
      while (cursor < order.size() && threads[order[cursor]]->state != Thread::ready) ++cursor;
      if (cursor < order.size()) {
        resume(order[cursor]);
        if (error) abandon();
      } else if (all([](const Thread& t) { return t.state == Thread::exited; })) {
        return;
      } else if (all([](const Thread& t) { return t.state == Thread::waiting && !is_warp_level(t); })) {
        begin_phase();
      } else {
        error = std::make_exception_ptr(std::runtime_error(deadlock()));
        abandon();
      }
    }
  }

  static bool is_warp_level(const Thread& t) { return t.operation != Operation::syncthreads; }

  template <class Predicate>
  bool all(Predicate predicate) const {
    return std::all_of(order.begin(), order.end(), [&](unsigned i) { return predicate(*threads[i]); });
  }

  // At the start of a block and at a completed __syncthreads.
  void begin_phase() {
    ++phase;
    if (schedule.threads == Schedule::shuffled) std::shuffle(order.begin(), order.end(), engine);
    for (unsigned rank = 0; rank < order.size(); ++rank) {
      threads[order[rank]]->rank = rank;
      threads[order[rank]]->state = Thread::ready;
    }
    cursor = 0;
  }

  void resume(unsigned thread) {
    current = thread;
    threadIdx = threads[thread]->index;
    switch_stack(scheduler, threads[thread]->stack);
  }

  // Unwinds the threads still running, then throws the error.
  [[noreturn]] void abandon() {
    abandoning = true;
    for (unsigned i : order)
      while (threads[i]->state != Thread::exited) resume(i);
    std::rethrow_exception(error);
  }

  unsigned first_lane(unsigned thread) const { return thread - thread % warpSize; }
  unsigned lanes(unsigned first) const { return std::min<unsigned>(warpSize, order.size() - first); }

  // PTX's shfl: only five bits of the operand count, and a source outside the segment means the lane's own value.
  static unsigned source_lane(Operation operation, unsigned lane, int operand, int width) {
    if (width < 1 || width > warpSize || (width & (width - 1)))
      throw std::runtime_error(std::string(name(operation)) + ": width " + std::to_string(width) +
                               " is not a power of two up to 32");
    const unsigned b = operand & (warpSize - 1);
    const unsigned begin = lane & ~(width - 1);
    const unsigned end = begin + width;
    switch (operation) {
      case Operation::shfl:
        return begin + b % width;
      case Operation::shfl_up:
        return lane >= begin + b ? lane - b : lane;
      case Operation::shfl_down:
        return lane + b < end ? lane + b : lane;
      case Operation::shfl_xor:
        return (lane ^ b) < end ? lane ^ b : lane;
      default:
        return lane;
    }
  }

  // Once every lane of the mask waits as `arrived` does, hands out the values and makes the lanes ready. All values at
  // once, because a lane that goes on may shuffle again before the others have read.
  void exchange_if_complete(const Thread& arrived) {
    const unsigned mask = arrived.mask, first = first_lane(current), count = lanes(first);
    unsigned char values[warpSize][sizeof arrived.value];
    std::memset(values, 0xff, sizeof values);
    for (unsigned lane = 0; lane < count; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (!threads[first + lane]->waits_with(arrived)) return;
      std::memcpy(values[lane], threads[first + lane]->value, sizeof values[lane]);
    }
    for (unsigned lane = 0; lane < count; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Thread& t = *threads[first + lane];
      std::memcpy(t.value, values[t.source], sizeof t.value);
      t.state = Thread::ready;
      cursor = std::min(cursor, t.rank);
    }
  }

  static std::string whereabouts(const Thread& t) {
    return "thread " + text(t.index) +
           (t.state == Thread::exited ? " has exited" : " waits at " + text(t.operation, t.mask, t.bytes));
  }

  // Why nothing can run. A warp-level operation that is stuck explains more than the barrier that others wait at.
  std::string deadlock() const {
    const std::string in_block = " in block " + text(blockIdx) + ": ";
    const Thread *waiting = nullptr, *exited = nullptr;
    for (unsigned i = 0; i < order.size(); ++i) {
      const Thread& t = *threads[i];
      if (t.state == Thread::exited) {
        exited = &t;
      } else if (!is_warp_level(t)) {
        waiting = &t;
      } else {
        unsigned lane = 0;
        const auto warp = &threads[first_lane(i)];
        while (!(t.mask >> lane & 1) || warp[lane]->waits_with(t)) ++lane;
        const bool at_barrier = warp[lane]->state == Thread::waiting && !is_warp_level(*warp[lane]);
        return (at_barrier ? "barrier divergence" : "warp deadlock") + in_block + whereabouts(t) + " for lane " +
               std::to_string(lane) + ", but " + whereabouts(*warp[lane]);
      }
    }
    return "barrier divergence" + in_block + whereabouts(*waiting) + ", but " + whereabouts(*exited);
  }

  const std::function<void()>& body;
  const Schedule schedule;
  const std::size_t shared_bytes;
  std::vector<std::unique_ptr<Thread>>& threads = pool;
  std::vector<unsigned> order;
  std::mt19937_64 engine;
  unsigned cursor = 0;   // no thread of a lower rank is ready
  unsigned current = 0;  // the thread that runs, or ran last
  bool abandoning = false;
  std::exception_ptr error;
};

// No locals here: ASan knows of the stack only from after_switch on.
void thread_main() {
  after_switch(active->current_stack(), scheduler);
  for (;;) {
    active->run_thread();
    switch_stack(active->current_stack(), scheduler);
  }
}

Launch& launch_of_caller(Operation operation) {
  if (!active) throw std::runtime_error(std::string(name(operation)) + " outside a kernel");
  return *active;
}

void check(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes) {
  const auto within = [](dim3 v, unsigned x, unsigned y, unsigned z) {
    return v.x >= 1 && v.x <= x && v.y >= 1 && v.y <= y && v.z >= 1 && v.z <= z;
  };
  if (!within(grid, 2147483647, 65535, 65535))
    throw std::runtime_error("grid " + text(grid) + ": a dimension is zero or exceeds (2147483647,65535,65535)");
  if (!within(block, 1024, 1024, 64))
    throw std::runtime_error("block " + text(block) + ": a dimension is zero or exceeds (1024,1024,64)");
  if (block.x * block.y * block.z > 1024)
    throw std::runtime_error("block " + text(block) + " has more than 1024 threads");
  if (dynamic_shared_bytes > CUDA_EMULATION_SHARED_LIMIT)
    throw std::runtime_error(std::to_string(dynamic_shared_bytes) + " bytes of dynamic shared memory exceed " +
                             std::to_string(CUDA_EMULATION_SHARED_LIMIT));
}

}  // namespace

void syncthreads() { launch_of_caller(Operation::syncthreads).wait_for_block(); }

void syncwarp(unsigned mask) {
  launch_of_caller(Operation::syncwarp).wait_for_warp(Operation::syncwarp, mask, nullptr, 0, 0, warpSize);
}

void shuffle(Operation operation, unsigned mask, void* value, std::size_t bytes, int operand, int width) {
  launch_of_caller(operation).wait_for_warp(operation, mask, value, bytes, operand, width);
}

void run(const Schedule& schedule, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
         const std::function<void()>& thread_body) {
  check(grid, block, dynamic_shared_bytes);
  if (active) throw std::runtime_error("launch inside a kernel");
  Launch(schedule, block, dynamic_shared_bytes, thread_body).run_grid(grid);
}

}  // namespace cuda_emulation
