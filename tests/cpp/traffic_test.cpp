// A guard against slowdowns of the CUDA kernels without a GPU: what they move, counted by the emulation
// (memory_trace.h), for a device of 132 multiprocessors. The bounds are what GCC 12 gives at -O1, on every machine.
//
// A fix that lowers a count lowers its bound; a change that must raise one says why in its commit.
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/leaf_launch.cuh"
#include "buffer.h"
#include "memory_trace.h"

using namespace leaf_cuda;
using namespace leaf_cuda::cuda;
using cuda_emulation::MemoryTrace;
using cuda_emulation::Schedule;

namespace {

constexpr int64_t kMultiprocessors = 132;

// Sectors moved of inputs, of outputs, and of all else in global memory, relative to those of a tensor of u's size; and
// the times that a bank of shared memory is read or written, per 1000 elements.
struct Traffic {
  double in, out, other, shared;
};

template <class S>
Traffic traffic(const Plan& plan, Operation operation) {
  Args a{};
  a.operation = operation;
  a.plan = plan;
  a.dtype = c10::CppTypeToScalarType<S>::value;
  a.workspace = workspace_limit(plan.numel(), sizeof(S));
  a.parameters.dtype = a.dp_dtype = c10::ScalarType::Float;
  a.parameters.matrix = {1, plan.count};
  std::vector<Buffer<char>> memory;
  MemoryTrace trace;
  const auto watched = [&](int64_t n, int64_t element_bytes) {
    void* const data = memory.emplace_back(n * element_bytes).data;
    trace.watch(data, n, element_bytes);
    return data;
  };
  int inputs = 0, outputs = 0, buffers = 0;
  Operations::dispatch(operation, [&](auto op) {
    const auto parameter = [&] { return watched(plan.count, 4); };
    for (; inputs < op.inputs; ++inputs) a.in[inputs] = watched(plan.numel(), sizeof(S)), a.in_stride[inputs] = 1;
    for (; outputs < op.outputs; ++outputs) a.out[outputs] = watched(plan.numel(), sizeof(S));
    for (int q = 0; q < 4 * op.sets; ++q) a.parameters.p[q] = parameter(), a.parameters.strides[q] = {0, 1};
    for (int q = 0; q < op.sums; ++q) a.dp[q] = parameter(), a.dp_strides[q] = {0, 1};
    buffers = static_cast<int>(memory.size());
  });
  const LaunchPlan b = plan_launch<S>(a, kMultiprocessors);
  void* const workspace = watched(b.sums.values, 4);
  launch<S>(a, b, workspace, [&](auto kernel, dim3 grid, int threads, size_t shared, const auto&... args) {
    trace.of_launch([&] {
      cuda_emulation::launch({Schedule::ascending, Schedule::ascending, 0}, kernel, grid, dim3(threads), shared,
                             args...);
    });
  });
  const auto sectors = [&](int from, int to) {
    int64_t sum = 0;
    for (int k = from; k < to; ++k) sum += trace.of(k).read.sectors + trace.of(k).write.sectors;
    return 32.0 * sum / (plan.numel() * sizeof(S));
  };
  return {sectors(0, inputs), sectors(inputs, inputs + outputs), sectors(inputs + outputs, buffers + 1),
          1000.0 * trace.of_shared().times / plan.numel()};
}

struct Bounds {
  Plan plan;
  Traffic forward[2], backward[2];  // float32, bfloat16
};

}  // namespace

int main() {
  if (!cuda_emulation::is_traced) {
    puts("not counted: this was compiled without -fsanitize=thread");
    return 77;  // CTest's code for a skipped test
  }
  const Bounds bounds[] = {
      {{1, 1, 1 << 20},
       {{1.00, 1.00, 0.06, 0.00}, {1.00, 1.00, 0.06, 0.00}},
       {{2.00, 1.00, 0.11, 15.39}, {2.00, 1.00, 0.14, 10.05}}},
      {{16, 64, 1024},
       {{1.00, 1.00, 0.06, 0.00}, {1.00, 1.00, 0.06, 0.00}},
       {{2.00, 1.00, 0.02, 2.44}, {2.00, 1.00, 0.04, 2.44}}},
      {{64, 64, 196},
       {{1.05, 1.05, 0.08, 0.00}, {1.05, 1.05, 0.13, 69.52}},
       {{2.10, 1.05, 0.02, 3.19}, {2.10, 1.05, 0.04, 42.89}}},
      {{256, 256, 49},
       {{1.05, 1.05, 0.03, 26.31}, {1.05, 1.05, 0.07, 34.76}},
       {{2.35, 1.88, 0.02, 3.19}, {2.10, 1.05, 0.08, 109.34}}},
      {{16, 256, 225},
       {{1.04, 1.04, 0.28, 71.11}, {1.04, 1.04, 0.57, 71.11}},
       {{2.13, 1.17, 0.08, 11.11}, {2.20, 1.57, 0.16, 11.11}}},
      {{16, 256, 195},
       {{1.04, 1.04, 0.29, 71.79}, {1.04, 1.04, 0.57, 71.79}},
       {{2.13, 1.17, 0.09, 12.82}, {2.22, 1.65, 0.16, 11.22}}},
      {{64, 16384, 1},
       {{1.00, 1.00, 1.00, 0.00}, {1.00, 1.00, 4.00, 0.00}},
       {{2.00, 1.00, 0.56, 31.25}, {2.00, 1.00, 2.12, 31.25}}},
      {{1024, 1024, 1},
       {{1.00, 1.00, 1.00, 0.00}, {1.00, 1.00, 4.00, 0.00}},
       {{2.00, 1.00, 1.92, 127.44}, {2.00, 1.00, 9.01, 156.74}}},
      {{16384, 64, 1},
       {{1.00, 1.00, 0.50, 0.00}, {1.00, 1.00, 1.00, 0.00}},
       {{2.00, 1.00, 0.97, 98.66}, {2.00, 1.00, 2.25, 126.98}}},
      {{65536, 3, 1},
       {{1.03, 1.03, 0.04, 67.02}, {1.03, 1.03, 0.09, 67.02}},
       {{2.07, 1.03, 0.13, 325.74}, {2.07, 1.03, 0.22, 334.82}}},
      {{8192, 16, 8},
       {{1.00, 1.00, 0.06, 35.16}, {1.00, 1.00, 0.12, 35.16}},
       {{2.00, 1.00, 0.15, 151.56}, {2.00, 1.00, 0.31, 195.81}}},
      {{1024, 64, 16},
       {{1.00, 1.00, 0.06, 0.00}, {1.00, 1.00, 0.12, 35.16}},
       {{2.00, 1.00, 0.02, 2.44}, {2.00, 1.00, 0.31, 197.30}}},
      {{16384, 5, 7},
       {{1.03, 1.03, 0.04, 62.55}, {1.03, 1.03, 0.08, 62.97}},
       {{2.07, 1.03, 0.13, 334.10}, {2.07, 1.03, 0.22, 307.05}}},
  };
  int failures = 0;
  for (const Bounds& b : bounds)
    for (int t = 0; t < 2; ++t)
      for (Operation operation : {Operation::forward, Operation::backward}) {
        const Traffic got = t ? traffic<c10::BFloat16>(b.plan, operation) : traffic<float>(b.plan, operation);
        const Traffic& bound = operation == Operation::forward ? b.forward[t] : b.backward[t];
        // Bounds have two decimals.
        const auto above = [](double count, double most) { return count > most + 0.005; };
        const bool failed = above(got.in, bound.in) || above(got.out, bound.out) || above(got.other, bound.other) ||
                            above(got.shared, bound.shared);
        printf("(%ld, %ld, %ld) %-8s %-8s in %.2f, out %.2f, other %.2f, shared %6.2f; bounds %.2f %.2f %.2f %.2f%s\n",
               long(b.plan.outer), long(b.plan.count), long(b.plan.inner), t ? "bfloat16" : "float32",
               operation == Operation::forward ? "forward" : "backward", got.in, got.out, got.other, got.shared,
               bound.in, bound.out, bound.other, bound.shared, failed ? "  ABOVE" : "");
        failures += failed;
      }
  return failures != 0;
}
