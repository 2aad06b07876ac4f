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

void segment(const InnerLoops& loops) { loops.segment(data.operands, kElements, data.parameters[0], false, data.sums); }
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
       {{11.12, 14.97, 11.83, 18.36, 20.28, 26.07, 14.01, 22.74, 65.18, 110.51, 40.62, 70.53},
        {4.62, 6.62, 5.18, 8.41, 9.54, 12.34, 6.29, 10.86, 27.29, 51.67, 16.79, 33.24},
        {5.78, 8.18, 6.45, 9.99, 12.49, 15.28, 7.96, 13.85, 29.93, 59.11, 19.52, 41.13},
        {4.62, 6.77, 5.26, 8.69, 9.81, 12.83, 6.49, 11.20, 27.24, 51.83, 17.00, 34.42}}},
      {"AVX512",
       &kLoopsAvx512,
       CpuCapability::avx512,
       {{5.13, 7.15, 5.63, 9.00, 10.21, 12.57, 6.91, 11.37, 31.05, 53.17, 19.40, 35.24},
        {2.19, 3.28, 2.42, 4.25, 4.78, 6.08, 3.08, 5.62, 12.88, 24.86, 8.06, 16.72},
        {2.70, 3.93, 3.00, 4.94, 6.12, 7.46, 3.75, 6.92, 14.30, 27.95, 9.39, 19.82},
        {2.25, 3.35, 2.47, 4.36, 5.10, 6.35, 3.10, 5.79, 12.92, 25.02, 8.34, 17.01}}},
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
