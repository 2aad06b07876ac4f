// Nanoseconds per element of the CPU's inner loops, on one core, on tensors that stay in the nearest caches: what the
// loops themselves cost, without memory, threads and PyTorch. Built by CMakeLists.txt as bench_loops.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>
#include <vector>

#include "../csrc/cpu/cpu_capability.h"
#include "../csrc/cpu/leaf_loops.h"

using namespace leaf_cuda;
using namespace leaf_cuda::cpu;

namespace {

constexpr int64_t kRows = 128, kColumns = 64, kElements = kRows * kColumns;

struct Data {
  alignas(64) float in[kMaxInputs][kElements], out[kMaxOutputs][kElements], by_column[kMaxParameters][kColumns];
  double one_set[kMaxParameters];
  alignas(64) double sums[kMaxSums * kSumStride<Forward>];
  Operands operands{};
  const void* p[kMaxParameters];

  Data() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    for (auto& input : in)
      for (float& x : input) x = normal(random);
    for (int q = 0; q < kMaxParameters; ++q) {
      for (float& x : by_column[q]) x = normal(random);
      one_set[q] = by_column[q][0];
      p[q] = by_column[q];
    }
    for (int k = 0; k < kMaxInputs; ++k) {
      operands.in[k] = in[k];
      operands.in_stride[k] = 1;
    }
    for (int k = 0; k < kMaxOutputs; ++k) operands.out[k] = out[k];
#if !defined(LEAF_BENCH_WITHOUT_ROWS)  // of commits before the gated unit
    std::fill_n(operands.in_row, kMaxInputs, kColumns);
    std::fill_n(operands.out_row, kMaxOutputs, kColumns);
#endif
  }
};
Data data;

template <class F>
double nanoseconds(F run) {
  constexpr int samples = 15, repeats = 500;
  std::vector<double> times;
  for (int s = 0; s < samples; ++s) {
    const auto start = std::chrono::steady_clock::now();
    for (int k = 0; k < repeats; ++k) run();
    const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - start;
    times.push_back(elapsed.count() / repeats / kElements);
  }
  std::nth_element(times.begin(), times.begin() + samples / 2, times.end());
  return times[samples / 2];
}

void print(const char* target, const char* operation, const InnerLoops& loops) {
  std::printf("%-7s %-16s", target, operation);
  if (loops.segment)
    std::printf("one set %.3f   ",
                nanoseconds([&] { loops.segment(data.operands, kElements, data.one_set, false, data.sums); }));
  const double columns =
      nanoseconds([&] { loops.columns(data.operands, kRows, kColumns, kColumns, data.p, false, data.sums); });
  std::printf("per column %.3f ns per element\n", columns);
}

}  // namespace

int main() {
  struct Target {
    const char* name;
    CpuCapability needs;
    const InnerLoopsByType& loops;
  };
  const Target targets[] = {
#if defined(__x86_64__)
      {"AVX512", CpuCapability::avx512, kLoopsAvx512},
      {"AVX2", CpuCapability::avx2, kLoopsAvx2},
#endif
      {"DEFAULT", CpuCapability::baseline, kLoopsBaseline}};
  for (const Target& t : targets) {
    if (cpu_capability() < t.needs) continue;
    print(t.name, "forward", t.loops.float32[Operation::forward]);
    print(t.name, "backward", t.loops.float32[Operation::backward]);
    print(t.name, "double backward", t.loops.float32[Operation::double_backward]);
    print(t.name, "lstm forward", t.loops.float32[Operation::lstm_forward]);
    print(t.name, "lstm backward", t.loops.float32[Operation::lstm_backward]);
    print(t.name, "gru forward", t.loops.float32[Operation::gru_forward]);
    print(t.name, "gru backward", t.loops.float32[Operation::gru_backward]);
  }
}
