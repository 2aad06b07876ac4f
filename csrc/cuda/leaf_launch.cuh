// From a backend's arguments to kernel launches. `Launcher` does the launch itself: on a stream, or in the tests'
// emulation. It is called as launch(kernel, grid, threads, shared bytes, kernel arguments...).
#pragma once

#include "leaf_kernels.cuh"

namespace leaf_cuda::cuda {

// Number of vectors of each input that a thread loads before it uses the first: about the same total over all inputs,
// whatever the operation. Of single elements of fewer than 8 bytes, twice as many.
template <class Op, class S, int N>
constexpr int kUnroll = (N == 1 && sizeof(S) < 8 ? 2 : 1) * (Op::inputs < 4 ? 4 / Op::inputs : 1);

// Elements in a 16-byte vector.
template <class S>
constexpr int kVector = 16 / sizeof(S);

// Whether a thread of the columns kernel has registers for the parameters and sums of a whole vector of columns. With
// more than one set of parameters it takes single elements; a warp's accesses are coalesced all the same.
template <class Op>
constexpr bool kColumnVectors = Op::sets == 1;

template <class Op, class S>
int unroll(bool vector) {
  return vector ? kUnroll<Op, S, kVector<S>> : kUnroll<Op, S, 1>;
}

template <class Op, class S, bool ByRows>
int min_blocks(bool vector) {
  return vector ? kMinBlocks<Op, S, kVector<S>, ByRows> : kMinBlocks<Op, S, 1, ByRows>;
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The plan of a pass, made before anything is launched.
struct LaunchPlan {
  bool vector, by_rows;
  RowsLaunch rows;
  ColumnsLaunch columns;
  bool sums_wanted;
  PartialSums sums;
  FinishLaunch finish;
  int64_t workspace_bytes;
};

template <class Op, class S>
LaunchPlan plan_pass(const Args& a, int64_t multiprocessors) {
  constexpr int64_t sum_bytes = sizeof(Arithmetic<S>);
  LaunchPlan b{};
  b.sums_wanted = std::any_of(a.dp, a.dp + Op::sums, [](const void* dp) { return dp; });
  const int sums = b.sums_wanted ? Op::sums : 0;
  b.vector = true;
  for (int k = 0; k < Op::inputs; ++k) b.vector = b.vector && (a.in_stride[k] == 0 || is_aligned(a.in[k]));
  for (int k = 0; k < Op::outputs; ++k) b.vector = b.vector && is_aligned(a.out[k]);
  const auto whole = [](int64_t elements) { return elements % kVector<S> == 0; };
  if (a.line) {
    b.vector = b.vector && whole(a.line);
    for (int k = 0; k < Op::inputs; ++k) b.vector = b.vector && whole(a.in_pitch[k]);
    for (int k = 0; k < Op::outputs; ++k) b.vector = b.vector && whole(a.out_pitch[k]);
  }
  const auto at_once = [&](bool by_rows, bool vector) {  // blocks that the device holds
    return multiprocessors * (by_rows ? min_blocks<Op, S, true>(vector) : min_blocks<Op, S, false>(vector));
  };
  const auto plan_by_rows = [&] {
    b.rows = plan_rows(a.plan, b.vector ? kVector<S> : 1, unroll<Op, S>(b.vector), at_once(true, b.vector), sums);
  };
  const auto plan_by_columns = [&](bool vector) {
    b.columns = plan_columns(a.plan, a.line, vector ? kVector<S> : 1, unroll<Op, S>(vector), at_once(false, vector),
                             a.workspace, sums, sum_bytes);
    b.sums = partial_sums(sums, b.columns.splits * b.columns.period_parts, a.plan.count);
  };
  const int64_t period = a.plan.period(), pitch = a.plan.pitch;
  const bool long_rows = has_long_rows(a.plan, sizeof(S));  // never with lines: `inner` is 1
  bool column_vectors = b.vector && kColumnVectors<Op> && (pitch == period || (whole(pitch) && whole(period))) &&
                        (!long_rows || may_be_columns(a.plan, kVector<S>));
  if (long_rows) plan_by_rows();
  if (column_vectors) {
    plan_by_columns(true);
    // Even without splits, periods side by side may need more partial sums than the workspace holds.
    column_vectors = b.sums.values * sum_bytes <= a.workspace && (!long_rows || b.columns.time < b.rows.time);
  }
  b.by_rows = long_rows && !column_vectors;
  if (b.by_rows) {
    b.sums = partial_sums(sums, b.rows.splits, a.plan.count);
  } else {
    b.vector = column_vectors;
    if (!b.vector) plan_by_columns(false);
    b.columns.parameter_vectors = b.vector && a.plan.inner == 1 && whole(a.parameters.matrix.columns);
    for (int q = 0; q < 4 * Op::sets; ++q) {
      const ParameterStrides& s = a.parameters.strides[q];
      b.columns.parameter_vectors &= s.column == 0 || (s.column == 1 && whole(s.row) && is_aligned(a.parameters.p[q]));
    }
  }
  b.finish = plan_finish(b.sums, at_once(b.by_rows, b.vector));
  b.workspace_bytes = b.sums.values * sum_bytes;
  return b;
}

template <class Op, class S, int N, class Launcher>
void launch_pass(const Args& a, const LaunchPlan& b, const SumTarget<Op::sums, S>& target, const Launcher& launch) {
  using A = Arithmetic<S>;
  Operands<Op, S> operands{};
  for (int k = 0; k < Op::inputs; ++k) {
    operands.in[k] = static_cast<const S*>(a.in[k]);
    operands.stride[k] = a.in_stride[k];
  }
  for (int k = 0; k < Op::outputs; ++k) operands.out[k] = static_cast<S*>(a.out[k]);
  if constexpr (Op::pitched) {
    for (int k = 0; k < Op::inputs; ++k) operands.in_pitch[k] = a.line ? a.in_pitch[k] : b.columns.columns.stride;
    for (int k = 0; k < Op::outputs; ++k) operands.out_pitch[k] = a.line ? a.out_pitch[k] : b.columns.columns.stride;
  }
  if constexpr (!Op::always_pitched)
    if (b.by_rows) {
      const RowsLaunch& r = b.rows;
      launch(rows<Op, S, N, kUnroll<Op, S, N>>, dim3(r.grid), r.threads, Op::sums * (r.threads / kWarp) * sizeof(A), r,
             a.parameters, operands, target);
      return;
    }
  if constexpr (N == 1 || kColumnVectors<Op>) {
    const ColumnsLaunch& c = b.columns;
    const int of_parameters = N > 1 && !c.parameter_vectors ? 4 : 0;
    launch(columns<Op, S, N, kUnroll<Op, S, N>>, dim3(c.tiles, c.splits), c.threads,
           sizeof(A) * std::max(Op::sums * c.ty, of_parameters) * c.tx * N, c, a.parameters, operands, target);
  }
}

// S: the storage type, a.dtype's.
template <class S>
LaunchPlan plan_launch(const Args& a, int64_t multiprocessors) {
  LaunchPlan b;
  Operations::dispatch(a.operation, [&](auto op) { b = plan_pass<decltype(op), S>(a, multiprocessors); });
  return b;
}

// workspace: b.workspace_bytes bytes of device memory.
template <class S, class Launcher>
void launch(const Args& a, const LaunchPlan& b, void* workspace, const Launcher& launcher) {
  Operations::dispatch(a.operation, [&](auto op) {
    using Op = decltype(op);
    using A = Arithmetic<S>;
    SumTarget<Op::sums, S> target{b.sums_wanted, b.sums, static_cast<A*>(workspace), a.dp_dtype, a.parameters.matrix};
    std::copy_n(a.dp, Op::sums, target.dp);
    std::copy_n(a.dp_strides, Op::sums, target.dp_strides);
    const auto run = b.vector ? launch_pass<Op, S, kVector<S>, Launcher> : launch_pass<Op, S, 1, Launcher>;
    run(a, b, target, launcher);
    if constexpr (Op::sums > 0)
      if (b.workspace_bytes)
        launcher(finish<Op::sums, S>, dim3(b.finish.grid, Op::sums), kMaxThreads, kMaxThreads * sizeof(double),
                 b.finish, target);
  });
}

}  // namespace leaf_cuda::cuda
