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
       {{11.34, 16.79, 11.47, 19.04, 22.72, 28.62, 13.29, 25.46, 68.75, 120.25, 43.40, 79.56, 12.15, 18.70},
        {4.81, 7.66, 4.95, 8.81, 10.59, 13.67, 5.90, 12.07, 30.92, 56.61, 19.25, 37.23, 5.58, 9.83},
        {6.04, 9.25, 6.31, 10.32, 13.62, 16.80, 7.62, 14.94, 33.03, 63.98, 20.17, 44.20, 6.78, 11.37},
        {4.66, 7.65, 5.04, 8.84, 11.00, 13.52, 6.25, 12.34, 29.41, 57.08, 18.26, 37.93, 5.32, 9.74}}},
      {"AVX512",
       &kLoopsAvx512,
       CpuCapability::avx512,
       {{5.69, 8.51, 5.88, 9.71, 11.57, 14.84, 6.85, 12.86, 34.52, 57.31, 21.50, 37.25, 6.62, 10.46},
        {2.34, 3.90, 2.61, 4.63, 5.51, 7.26, 3.15, 6.22, 15.04, 26.67, 9.47, 17.68, 2.98, 5.53},
        {2.92, 4.67, 3.24, 5.31, 6.74, 8.63, 3.93, 7.64, 16.14, 30.24, 10.05, 21.20, 3.58, 6.32},
        {2.37, 3.89, 2.67, 4.63, 5.61, 7.32, 3.28, 6.36, 14.65, 27.04, 9.14, 18.06, 2.94, 5.54}}},
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
