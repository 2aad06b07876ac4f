// From a backend's arguments to kernel launches. `Launcher` does the launch itself: on a stream, or in the tests'
// emulation. It is called as launch(kernel, grid, threads, shared bytes, kernel arguments...).
#pragma once

#include "leaf_kernels.cuh"

namespace leaf_cuda::cuda {

// Vectors that a thread has under way at once.
constexpr int kForwardUnroll = 4;
constexpr int kBackwardUnroll = 2;

template <class F>
void dispatch_storage(c10::ScalarType dtype, F f) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return f(double{});
    case c10::ScalarType::Float:
      return f(float{});
    case c10::ScalarType::BFloat16:
      return f(c10::BFloat16{});
    default:
      return f(c10::Half{});
  }
}

// Elements in a 16-byte vector.
template <class S>
constexpr int kVector = 16 / sizeof(S);

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class S, int N, class Launcher>
void forward_by(const ForwardArgs& a, int64_t multiprocessors, const Launcher& launch) {
  const S* u = static_cast<const S*>(a.u);
  S* y = static_cast<S*>(a.y);
  if (by_rows(a.plan, sizeof(S))) {
    const RowsLaunch r = plan_rows(a.plan, N, kForwardUnroll, multiprocessors);
    launch(forward_rows<S, N, kForwardUnroll>, dim3(r.grid), r.threads, 0, r, a.parameters, u, y);
  } else {
    const ColumnsLaunch c = plan_columns(a.plan, N, kForwardUnroll, multiprocessors, sizeof(S), sizeof(Arithmetic<S>));
    launch(forward_columns<S, N, kForwardUnroll>, dim3(c.tiles, c.splits), c.threads, 0, c, a.parameters, u, y);
  }
}

template <class Launcher>
void launch_forward(const ForwardArgs& a, int64_t multiprocessors, const Launcher& launch) {
  dispatch_storage(a.dtype, [&](auto zero) {
    using S = decltype(zero);
    const bool vector = is_aligned(a.u) && is_aligned(a.y);
    const auto run = vector ? forward_by<S, kVector<S>, Launcher> : forward_by<S, 1, Launcher>;
    run(a, multiprocessors, launch);
  });
}

// One of the two ways of backward, planned: what it needs before it is launched.
struct BackwardPlan {
  bool vector, rows;
  RowsLaunch by_rows;
  ColumnsLaunch by_columns;
  bool sums_wanted;
  PartialSums sums;
  FinishLaunch finish;
  int64_t workspace_bytes;
};

template <class S>
BackwardPlan plan_backward(const BackwardArgs& a, int64_t multiprocessors) {
  constexpr int64_t sum_bytes = sizeof(Arithmetic<S>);
  BackwardPlan b{};
  b.vector = is_aligned(a.u) && is_aligned(a.du) && (a.grad_stride == 0 || is_aligned(a.grad));
  b.rows = by_rows(a.plan, sizeof(S));
  if (b.rows) {
    b.by_rows = plan_rows(a.plan, b.vector ? kVector<S> : 1, kBackwardUnroll, multiprocessors);
    b.sums = partial_sums(b.by_rows.splits, 1, a.plan.count);
  } else {
    const auto plan = [&](int vector) {
      return plan_columns(a.plan, vector, kBackwardUnroll, multiprocessors, sizeof(S), sum_bytes);
    };
    if (b.vector) b.by_columns = plan(kVector<S>);
    if (!b.vector || !columns_fit(b.by_columns, a.plan, sizeof(S), sum_bytes)) {
      b.vector = false;
      b.by_columns = plan(1);
    }
    b.sums = partial_sums(b.by_columns.splits, b.by_columns.columns.fold, a.plan.count);
  }
  b.finish = plan_finish(b.sums, multiprocessors);
  b.sums_wanted = a.dp[0] || a.dp[1] || a.dp[2] || a.dp[3];
  b.workspace_bytes = b.sums_wanted ? b.sums.values * sum_bytes : 0;
  return b;
}

inline BackwardPlan plan_backward(const BackwardArgs& a, int64_t multiprocessors) {
  BackwardPlan b;
  dispatch_storage(a.dtype, [&](auto zero) { b = plan_backward<decltype(zero)>(a, multiprocessors); });
  return b;
}

template <class S, int N, class Launcher>
void backward_by(const BackwardArgs& a, const BackwardPlan& b, const SumTarget<Arithmetic<S>>& target,
                 const Launcher& launch) {
  using A = Arithmetic<S>;
  const BackwardPointers<S> pointers = {static_cast<const S*>(a.u), static_cast<const S*>(a.grad),
                                        static_cast<S*>(a.du), a.grad_stride};
  if (b.rows) {
    const RowsLaunch& r = b.by_rows;
    launch(backward_rows<S, N, kBackwardUnroll>, dim3(r.grid), r.threads, 4 * (r.threads / kWarp) * sizeof(A), r,
           a.parameters, pointers, target);
  } else {
    const ColumnsLaunch& c = b.by_columns;
    const bool alone = c.ty == 1 && c.inner == 1;
    launch(backward_columns<S, N, kBackwardUnroll>, dim3(c.tiles, c.splits), c.threads,
           alone ? 0 : sizeof(A) * 4 * c.ty * c.tx * N, c, a.parameters, pointers, target);
  }
}

// workspace: b.workspace_bytes on the device.
template <class Launcher>
void launch_backward(const BackwardArgs& a, const BackwardPlan& b, void* workspace, const Launcher& launch) {
  dispatch_storage(a.dtype, [&](auto zero) {
    using S = decltype(zero);
    using A = Arithmetic<S>;
    SumTarget<A> target{
        b.sums_wanted, b.sums, static_cast<A*>(workspace), {a.dp[0], a.dp[1], a.dp[2], a.dp[3]}, a.dp_dtype};
    const auto run = b.vector ? backward_by<S, kVector<S>, Launcher> : backward_by<S, 1, Launcher>;
    run(a, b, target, launch);
    if (b.workspace_bytes == 0) return;
    launch(finish<A>, dim3(b.finish.grid), kMaxThreads, 4 * kMaxThreads * sizeof(A), b.finish, target);
  });
}

}  // namespace leaf_cuda::cuda
