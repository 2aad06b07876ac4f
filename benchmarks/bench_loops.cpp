// Nanoseconds per element of the CPU's inner loops, on one core, on tensors that stay in the nearest caches: what the
// loops themselves cost, without memory, threads and PyTorch. Built by CMakeLists.txt as bench_loops.
#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/cpu/cpu_capability.h"
#include "../csrc/cpu/leaf_loops.h"

using namespace leaf_cuda;
using namespace leaf_cuda::cpu;

namespace {

constexpr int64_t kRows = 128, kColumns = 64, kElements = kRows * kColumns;

uint16_t to_bfloat16(float x) { return std::bit_cast<uint32_t>(x) >> 16; }
uint16_t to_float16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), exponent = bits >> 23 & 0xff;
  return exponent <= 112 ? 0 : (bits >> 16 & 0x8000) | (exponent - 112) << 10 | (bits >> 13 & 0x3ff);
}

struct Data {
  alignas(64) char in[kMaxInputs][kElements * sizeof(float)], out[kMaxOutputs][kElements * sizeof(float)];
  alignas(64) float by_column[kMaxParameters][kColumns];
  double one_set[kMaxParameters];
  alignas(64) double sums[kMaxSums * kSumStride<Forward>];
  Operands operands{};
  const void* p[kMaxParameters];

  Data() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
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
    std::fill_n(operands.in_row, kMaxInputs, kColumns);
    std::fill_n(operands.out_row, kMaxOutputs, kColumns);
  }

  // Fills the inputs with normally distributed numbers, as convert(float) stores them.
  template <class F>
  void fill(F convert) {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    for (auto& input : in)
      for (int64_t i = 0; i < kElements; ++i) {
        const auto x = convert(normal(random));
        std::memcpy(input + i * sizeof(x), &x, sizeof(x));
      }
  }
};
Data data;

// Per element of `run`'s.
template <class F>
double nanoseconds(int64_t elements, F run) {
  constexpr int samples = 15;
  const int64_t repeats = 500 * kElements / elements;
  std::vector<double> times;
  for (int s = 0; s < samples; ++s) {
    const auto start = std::chrono::steady_clock::now();
    for (int k = 0; k < repeats; ++k) run();
    const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - start;
    times.push_back(elapsed.count() / (repeats * elements));
  }
  std::nth_element(times.begin(), times.begin() + samples / 2, times.end());
  return times[samples / 2];
}

void print(const char* target, const char* dtype, const InnerLoopsByOperation& by_operation,
           std::initializer_list<Operation> operations) {
  const char* names[] = {"forward",      "backward",      "double backward", "glu forward", "glu backward",
                         "lstm forward", "lstm backward", "gru forward",     "gru backward"};
  static_assert(std::size(names) == Operations::count);
  for (const Operation operation : operations) {
    const InnerLoops& loops = by_operation[operation];
    std::printf("%-7s %-8s %-15s  ", target, dtype, names[static_cast<int>(operation)]);
    const Segment whole{0, kElements};
    if (loops.segments)
      std::printf("one set %.3f   ", nanoseconds(kElements, [&] {
                    loops.segments(data.operands, &whole, 1, data.one_set, false, data.sums);
                  }));
    const auto columns = [&](int64_t rows) {
      return nanoseconds(rows * kColumns,
                         [&] { loops.columns(data.operands, rows, kColumns, kColumns, data.p, false, data.sums); });
    };
    std::printf("per column %.3f, of three rows %.3f, of one %.3f ns per element\n", columns(kRows), columns(3),
                columns(1));
  }
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
  using enum Operation;
  for (const Target& t : targets) {
    if (cpu_capability() < t.needs) continue;
    data.fill([](float x) { return x; });
    print(t.name, "float32", t.loops.float32,
          {forward, backward, double_backward, lstm_forward, lstm_backward, gru_forward, gru_backward});
    data.fill(to_bfloat16);
    print(t.name, "bfloat16", t.loops.bfloat16, {forward, backward});
    data.fill(to_float16);
    print(t.name, "float16", t.loops.float16, {forward, backward});
  }
}
