// A guard against slowdowns without a clock: the instructions per element that each loop of the CPU executes, counted
// by stepping through it in a child process. They are the same on a busy machine as on a quiet one.
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
void columns(const InnerLoops& loops) {
  loops.columns(data.operands, kRows, kColumns, kColumns, data.p, false, data.sums);
}

// 0 where the system does not let a process step through its child.
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
                           {"gru backward, per column", columns, Operation::gru_backward}};
constexpr int kLoopCount = sizeof(kLoops) / sizeof(Loop);

struct Target {
  const char* name;
  const InnerLoopsByType* loops;
  CpuCapability needs;
  double bounds[4][kLoopCount];  // dtype, loop
};

}  // namespace

int main() {
  // Measured and rounded up by 2 percent.
  const Target targets[] = {
#if defined(__x86_64__)
      {"AVX2",
       &kLoopsAvx2,
       CpuCapability::avx2,
       {{11.67, 16.90, 12.01, 17.06, 22.01, 24.36, 14.01, 21.63, 63.82, 104.97, 40.61, 68.88},
        {4.91, 7.57, 5.17, 7.95, 10.14, 11.38, 6.28, 10.29, 27.77, 48.72, 16.70, 32.05},
        {6.32, 9.04, 6.51, 9.45, 13.51, 14.68, 7.73, 13.47, 30.44, 56.75, 19.80, 39.47},
        {5.17, 7.70, 5.25, 8.15, 10.76, 12.11, 6.48, 10.67, 27.21, 49.63, 16.98, 32.64}}},
      {"AVX512",
       &kLoopsAvx512,
       CpuCapability::avx512,
       {{5.68, 7.96, 5.49, 8.65, 10.73, 11.95, 6.70, 10.80, 30.94, 52.32, 19.19, 35.04},
        {2.43, 3.75, 2.39, 4.10, 5.06, 5.73, 3.04, 5.39, 12.95, 24.23, 7.92, 16.35},
        {3.00, 4.41, 3.01, 4.70, 6.41, 7.06, 3.76, 6.61, 14.31, 27.18, 9.33, 19.16},
        {2.55, 3.82, 2.51, 4.15, 5.31, 6.04, 3.08, 5.52, 12.89, 24.78, 8.38, 16.23}}},
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
