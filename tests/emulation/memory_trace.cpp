#include "memory_trace.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace cuda_emulation {
namespace {

uintptr_t shared_begin() { return reinterpret_cast<uintptr_t>(leaf_cuda::leaf_smem); }

std::string text(const char* of, uint3 v) {
  return std::string(of) + " (" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

}  // namespace

int MemoryTrace::watch(const void* begin, int64_t n, size_t element_bytes) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  buffers.push_back({at, at + n * element_bytes, element_bytes, {}, std::vector<Users>(n)});
  return static_cast<int>(buffers.size()) - 1;
}

void MemoryTrace::begin_launch() {
  ++launches;
  in_phase = phase;
  shared_users.resize(CUDA_EMULATION_SHARED_LIMIT / 4);
  active = this;
}

void MemoryTrace::end_launch() {
  active = nullptr;
  end_phase();
  if (!race.empty()) throw std::runtime_error(std::exchange(race, {}));
}

void MemoryTrace::record(uintptr_t at, int bytes, bool is_write, const void* site) {
  if (in_phase != phase) end_phase();
  const uint64_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int64_t block = blockIdx.x + int64_t{gridDim.x} * (blockIdx.y + int64_t{gridDim.y} * blockIdx.z);
  int buffer = -1;
  if (at - shared_begin() < CUDA_EMULATION_SHARED_LIMIT) {
    for (uintptr_t word = at / 4; word <= (at + bytes - 1) / 4; ++word)
      check_race(shared_users[word - shared_begin() / 4], phase, thread, is_write, "shared");
  } else {
    const auto holds = [&](const Buffer& b) { return at >= b.begin && at < b.end; };
    const auto found = std::find_if(buffers.begin(), buffers.end(), holds);
    if (found == buffers.end()) return;  // a thread's own memory, or the kernel's arguments
    buffer = static_cast<int>(found - buffers.begin());
    for (uintptr_t i = at; i < at + bytes; i += found->element_bytes)
      check_race(found->users.at((i - found->begin) / found->element_bytes), launches, block * 1024 + thread, is_write,
                 "global");
  }
  const uint64_t place = places.try_emplace({site, buffer}, places.size()).first->second;
  const uint64_t turn = turns[thread << 32 | place]++;
  accesses.push_back({(thread / warpSize) << 48 | place << 32 | turn, static_cast<unsigned>(thread % warpSize), at,
                      bytes, buffer, is_write});
}

void MemoryTrace::check_race(Users& users, uint64_t since, int64_t thread, bool is_write, const char* memory) {
  if (users.since != since) users = {since};
  const auto is_other = [&](int64_t user) { return user >= 0 && user != thread; };
  if (is_other(users.writer) || (is_write && (is_other(users.reader) || is_other(users.other_reader)))) {
    if (race.empty())
      race = std::string("data race in ") + memory + " memory: " + text("thread", threadIdx) +
             text(" of block", blockIdx) + (is_write ? " writes" : " reads") + " what another " +
             (is_other(users.writer) ? "wrote" : "read");
  }
  if (is_write)
    users.writer = thread;
  else
    (users.reader < 0 || users.reader == thread ? users.reader : users.other_reader) = thread;
}

// Counts the requests since the last barrier.
void MemoryTrace::end_phase() {
  std::sort(accesses.begin(), accesses.end(),
            [](const Access& a, const Access& b) { return std::tie(a.request, a.lane) < std::tie(b.request, b.lane); });
  for (auto first = accesses.begin(); first != accesses.end();) {
    const auto last = std::find_if(first, accesses.end(), [&](const Access& a) { return a.request != first->request; });
    count_request(&*first, &*first + (last - first));
    first = last;
  }
  accesses.clear();
  turns.clear();
  in_phase = phase;
}

void MemoryTrace::count_request(const Access* first, const Access* last) {
  const auto distinct = [](std::vector<uintptr_t>& v) {
    std::sort(v.begin(), v.end());
    v.erase(std::unique(v.begin(), v.end()), v.end());
    return static_cast<int64_t>(v.size());
  };
  if (first->buffer >= 0) {
    Traffic& traffic = buffers[first->buffer].traffic;
    Requests& requests = first->is_write ? traffic.write : traffic.read;
    std::vector<uintptr_t> sectors;
    for (const Access* a = first; a != last; ++a) {
      requests.bytes += a->bytes;
      for (uintptr_t sector = a->at / 32; sector <= (a->at + a->bytes - 1) / 32; ++sector) sectors.push_back(sector);
    }
    ++requests.count;
    requests.sectors += distinct(sectors);
    return;
  }
  ++shared_traffic.requests;
  const unsigned lanes_at_once = std::clamp(warpSize * 4 / first->bytes, 1, warpSize);
  std::vector<uintptr_t> all;
  while (first != last) {
    std::vector<uintptr_t> words;
    for (const unsigned part = first->lane / lanes_at_once; first != last && first->lane / lanes_at_once == part;
         ++first)
      for (uintptr_t word = first->at / 4; word <= (first->at + first->bytes - 1) / 4; ++word) words.push_back(word);
    distinct(words);
    int64_t of_bank[32] = {}, times = 0;
    for (uintptr_t word : words) times = std::max(times, ++of_bank[word % 32]);
    shared_traffic.times += times;
    all.insert(all.end(), words.begin(), words.end());
  }
  shared_traffic.least += (distinct(all) + 31) / 32;
}

}  // namespace cuda_emulation

// ---- what the compiler calls ----------------------------------------------------------------------------------------

#define ACCESS(name, bytes, is_write, ...)                                                 \
  extern "C" void __tsan_##name(void* at __VA_OPT__(, ) __VA_ARGS__) {                     \
    cuda_emulation::MemoryTrace::access(at, bytes, is_write, __builtin_return_address(0)); \
  }
#define ACCESSES(bytes)             \
  ACCESS(read##bytes, bytes, false) \
  ACCESS(write##bytes, bytes, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
ACCESS(read_range, bytes, false, long bytes)
ACCESS(write_range, bytes, true, long bytes)
#undef ACCESSES
#undef ACCESS
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit(void*) {}
extern "C" void __tsan_vptr_update(void*, void*) {}
