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
void one_row(const InnerLoops& loops) { loops.columns(data.operands, 1, kColumns, kColumns, data.p, false, data.sums); }

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
  int64_t elements = kElements;
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
                           {"backward, set per row", segment_per_row, Operation::backward},
                           {"backward, one row", one_row, Operation::backward, kColumns},
                           {"lstm forward, one row", one_row, Operation::lstm_forward, kColumns},
                           {"lstm backward, one row", one_row, Operation::lstm_backward, kColumns}};
constexpr int kLoopCount = sizeof(kLoops) / sizeof(Loop);

struct Target {
  const char* name;
  const InnerLoopsByType* loops;
  CpuCapability needs;
  double bounds[4][kLoopCount];  // dtype, loop
};

}  // namespace

int main() {
  // The measured counts plus two percent. (AVX512's of one row were counted by an emulated processor.)
  const Target targets[] = {
#if defined(__x86_64__)
      {"AVX2",
       &kLoopsAvx2,
       CpuCapability::avx2,
       {{11.66, 16.02, 11.77, 18.33, 23.44, 27.71, 13.28, 25.75, 72.22, 120.55, 45.26, 78.99, 12.45, 17.94, 28.91,
         66.82, 153.62},
        {4.90, 7.31, 5.04, 8.40, 10.96, 13.17, 5.90, 12.08, 31.39, 56.19, 20.03, 37.33, 5.64, 9.57, 15.46, 30.98,
         77.62},
        {6.19, 8.80, 6.46, 9.93, 14.25, 16.18, 7.97, 15.23, 33.35, 63.85, 20.92, 44.08, 6.90, 10.85, 16.95, 34.87,
         88.18},
        {4.55, 7.36, 5.21, 8.44, 11.25, 13.50, 6.54, 12.35, 30.32, 56.94, 19.03, 37.98, 5.19, 9.38, 15.42, 31.08,
         79.21}}},
      {"AVX512",
       &kLoopsAvx512,
       CpuCapability::avx512,
       {{5.77, 8.04, 5.81, 9.26, 11.46, 14.90, 6.90, 12.74, 34.82, 57.30, 22.26, 37.14, 6.39, 9.80, 17.34, 34.83,
         82.90},
        {2.41, 3.61, 2.61, 4.41, 5.50, 7.21, 3.16, 6.18, 15.19, 26.88, 9.81, 17.62, 3.00, 5.25, 10.18, 17.09, 42.70},
        {2.94, 4.28, 3.24, 5.09, 6.59, 8.47, 3.93, 7.37, 16.35, 30.30, 10.40, 21.05, 3.58, 5.94, 10.75, 17.85, 45.82},
        {2.41, 3.61, 2.68, 4.42, 5.46, 7.30, 3.29, 6.03, 14.85, 27.10, 9.56, 18.07, 2.96, 5.25, 10.16, 16.41, 42.40}}},
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
        const double each = double(count) / kLoops[l].elements, bound = target.bounds[t][l];
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
