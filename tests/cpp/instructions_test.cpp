// A guard against slowdowns that needs no clock: counts the instructions per element that each CPU loop executes, by
// single-stepping it in a child process. The counts are the same on a busy machine as on an idle one.
//
// The bounds hold for GCC 12; with another compiler the counts are printed only. A fix that lowers a count lowers its
// bound; a change that must raise one says why in its commit.
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <vector>

#include "../../csrc/cpu/cpu_capability.h"
#include "../../csrc/cpu/leaf_loops.h"

using namespace leaf_cuda;
using namespace leaf_cuda::cpu;

namespace {

constexpr int64_t kRows = 8, kColumns = 128, kElements = kRows * kColumns;

struct Data {
  // Zeros are valid in every dtype, and no instruction depends on the values.
  alignas(64) char in[kMaxInputs][kElements * 8] = {}, out[kMaxOutputs][kElements * 8] = {};
  alignas(64) double parameters[kMaxParameters][kColumns] = {};
  alignas(64) double sums[kMaxSums * kSumStride<Forward>] = {};
  Operands operands;
  const void* p[kMaxParameters];

  Data() {
    for (int k = 0; k < kMaxInputs; ++k)
      operands.in[k] = in[k], operands.in_stride[k] = 1, operands.in_row[k] = kColumns;
    for (int k = 0; k < kMaxOutputs; ++k) operands.out[k] = out[k], operands.out_row[k] = kColumns;
    for (int q = 0; q < kMaxParameters; ++q) p[q] = parameters[q];
  }
};
Data data;

void segment(const InnerLoops& loops) {
  const Segment whole{0, kElements};
  loops.segments(data.operands, &whole, 1, data.parameters[0], false, data.sums);
}
void segment_per_row(const InnerLoops& loops) {
  Segment rows[kRows];
  for (int64_t r = 0; r < kRows; ++r) rows[r] = {r * kColumns, (r + 1) * kColumns};
  loops.segments(data.operands, rows, kRows, data.parameters[0], false, data.sums);
}
void columns(const InnerLoops& loops) {
  loops.columns(data.operands, kRows, kColumns, kColumns, data.p, false, data.sums);
}

// Number of instructions that run(loops) executes; 0 where the system does not let a process step through its child.
long instructions(void (*run)(const InnerLoops&), const InnerLoops& loops) {
  const pid_t child = fork();
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(1);
    raise(SIGSTOP);
    run(loops);
    raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFSTOPPED(status)) return 0;
  long count = 0;
  do {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) return 0;
    waitpid(child, &status, 0);
    ++count;
  } while (WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP);
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return count;
}

struct Loop {
  const char* name;
  void (*run)(const InnerLoops&);
  Operation operation;
};
constexpr Loop kLoops[] = {{"forward, one set", segment, Operation::forward},
                           {"backward, one set", segment, Operation::backward},
                           {"forward, per column", columns, Operation::forward},
                           {"backward, per column", columns, Operation::backward},
                           {"double backward, one set", segment, Operation::double_backward},
                           {"double backward, per column", columns, Operation::double_backward},
                           {"glu forward, per column", columns, Operation::glu_forward},
                           {"glu backward, per column", columns, Operation::glu_backward},
                           {"lstm forward, per column", columns, Operation::lstm_forward},
                           {"lstm backward, per column", columns, Operation::lstm_backward},
                           {"gru forward, per column", columns, Operation::gru_forward},
                           {"gru backward, per column", columns, Operation::gru_backward},
                           {"forward, set per row", segment_per_row, Operation::forward},
                           {"backward, set per row", segment_per_row, Operation::backward}};
constexpr int kLoopCount = sizeof(kLoops) / sizeof(Loop);

struct Target {
  const char* name;
  const InnerLoopsByType* loops;
  CpuCapability needs;
  double bounds[4][kLoopCount];  // dtype, loop
};

}  // namespace

int main() {
  // The measured counts plus two percent.
  const Target targets[] = {
#if defined(__x86_64__)
      {"AVX2",
       &kLoopsAvx2,
       CpuCapability::avx2,
       {{10.91, 16.37, 11.49, 16.80, 21.50, 23.79, 13.05, 21.00, 62.09, 103.18, 37.05, 67.34, 11.32, 17.18},
        {4.52, 7.31, 4.72, 7.62, 9.88, 11.11, 5.95, 9.96, 26.20, 47.61, 16.01, 31.50, 4.87, 8.45},
        {5.67, 8.48, 5.95, 8.83, 12.83, 14.16, 7.05, 12.82, 26.45, 53.54, 16.56, 37.66, 5.99, 9.57},
        {4.50, 7.14, 4.56, 7.55, 10.20, 11.58, 5.74, 10.07, 23.43, 47.20, 15.14, 30.99, 4.81, 8.21}}},
      {"AVX512",
       &kLoopsAvx512,
       CpuCapability::avx512,
       {{5.55, 7.96, 5.45, 8.65, 10.71, 11.95, 6.55, 10.80, 30.04, 52.32, 18.61, 35.04, 5.96, 9.22},
        {2.37, 3.72, 2.37, 4.10, 5.02, 5.73, 2.96, 5.39, 12.57, 24.23, 7.71, 16.35, 2.76, 4.90},
        {2.87, 4.24, 2.82, 4.56, 6.26, 6.92, 3.51, 6.49, 13.18, 26.25, 8.50, 18.45, 3.22, 5.42},
        {2.36, 3.63, 2.30, 4.00, 5.15, 5.90, 2.89, 5.39, 11.95, 23.63, 7.75, 15.83, 2.72, 4.79}}},
#endif
  };
  const char* dtypes[] = {"float64", "float32", "bfloat16", "float16"};
  int failures = 0;
  for (const Target& target : targets) {
    if (cpu_capability() < target.needs) {
      printf("%s: not counted, this processor has no such instructions\n", target.name);
      continue;
    }
    const InnerLoopsByOperation loops[] = {target.loops->float64, target.loops->float32, target.loops->bfloat16,
                                           target.loops->float16};
    for (int t = 0; t < 4; ++t)
      for (int l = 0; l < kLoopCount; ++l) {
        const long count = instructions(kLoops[l].run, loops[t][kLoops[l].operation]);
        if (count == 0) {
          puts("not counted: this system does not let a process trace its child");
          return 77;  // CTest's code for a skipped test
        }
        const double each = double(count) / kElements, bound = target.bounds[t][l];
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ == 12
        const bool above = each > bound;
#else
        const bool above = false;
#endif
        printf("%s %-9s %-27s %6.2f instructions per element, bound %.2f%s\n", target.name, dtypes[t], kLoops[l].name,
               each, bound, above ? "  ABOVE" : "");
        failures += above;
      }
  }
  return failures != 0;
}
