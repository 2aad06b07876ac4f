// The CUDA kernels: forward and backward over rows and over columns (launch_plan.h), and the sum of partial sums.
//
// Plain CUDA without ATen; the tests also compile it for the host (tests/emulation).
#pragma once

#include <cuda_runtime.h>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../leaf_args.h"
#include "../leaf_math.h"
#include "launch_plan.h"

namespace leaf_cuda {

extern __shared__ __align__(16) unsigned char leaf_smem[];

namespace cuda {

// ---- arithmetic -----------------------------------------------------------------------------------------------------

struct DoubleMath {
  using T = double;
  static __device__ __forceinline__ double exp_neg_abs(double z) { return exp(-fabs(z)); }
  static __device__ __forceinline__ double reciprocal(double x) { return 1 / x; }
  static __device__ __forceinline__ double select(double z, double a, double b) { return z >= 0 ? a : b; }
};

struct FloatMath {
  using T = float;
  static __device__ __forceinline__ float exp_neg_abs(float z) { return expf(-fabsf(z)); }
  // The approximate reciprocal and a Newton step: within 1 ulp, without the full division's slow path.
  static __device__ __forceinline__ float reciprocal(float x) {
    const float r = __fdividef(1.0f, x);
    return fmaf(r, fmaf(-x, r, 1.0f), r);
  }
  static __device__ __forceinline__ float select(float z, float a, float b) { return z >= 0 ? a : b; }
};

// For float16 and bfloat16: errors of some 2^-22·(1 + |z|) are far below what these types resolve.
struct ApproximateMath : FloatMath {
  static __device__ __forceinline__ float exp_neg_abs(float z) { return __expf(-fabsf(z)); }
  static __device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }
};

template <class S>
struct MathOf {
  using type = ApproximateMath;
};
template <>
struct MathOf<float> {
  using type = FloatMath;
};
template <>
struct MathOf<double> {
  using type = DoubleMath;
};
template <class S>
using Math = typename MathOf<S>::type;
template <class S>
using Arithmetic = typename Math<S>::T;

// ---- memory ---------------------------------------------------------------------------------------------------------

// N elements that move together; 16 bytes of them move in one instruction.
template <class S, int N>
struct Vector {
  S at[N];
};

template <class S, int N>
__device__ __forceinline__ Vector<S, N> load_vector(const S* p) {
  Vector<S, N> v;
  if constexpr (sizeof(v) == 16) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    memcpy(&v, &raw, sizeof(v));
  } else {
    static_assert(N == 1);
    v.at[0] = *p;
  }
  return v;
}

template <class S, int N>
__device__ __forceinline__ void store_vector(S* p, const Vector<S, N>& v) {
  if constexpr (sizeof(v) == 16) {
    uint4 raw;
    memcpy(&raw, &v, sizeof(v));
    *reinterpret_cast<uint4*>(p) = raw;
  } else {
    static_assert(N == 1);
    *p = v.at[0];
  }
}

template <class A>
__device__ __forceinline__ A load_as(const void* p, c10::ScalarType type, int64_t i) {
  switch (type) {
    case c10::ScalarType::Double:
      return static_cast<A>(static_cast<const double*>(p)[i]);
    case c10::ScalarType::Float:
      return static_cast<A>(static_cast<const float*>(p)[i]);
    case c10::ScalarType::BFloat16:
      return static_cast<A>(static_cast<float>(static_cast<const c10::BFloat16*>(p)[i]));
    default:
      return static_cast<A>(static_cast<float>(static_cast<const c10::Half*>(p)[i]));
  }
}

template <class A>
__device__ __forceinline__ void store_as(void* p, c10::ScalarType type, int64_t i, A value) {
  switch (type) {
    case c10::ScalarType::Double:
      static_cast<double*>(p)[i] = static_cast<double>(value);
      break;
    case c10::ScalarType::Float:
      static_cast<float*>(p)[i] = static_cast<float>(value);
      break;
    case c10::ScalarType::BFloat16:
      static_cast<c10::BFloat16*>(p)[i] = static_cast<c10::BFloat16>(static_cast<float>(value));
      break;
    default:
      static_cast<c10::Half*>(p)[i] = static_cast<c10::Half>(static_cast<float>(value));
  }
}

template <class A>
__device__ __forceinline__ Parameters<A> load_parameters(const FlatParameters& f, int64_t k) {
  const auto value = [&](int q) { return f.p[q] ? load_as<A>(f.p[q], f.dtype, k * f.stride[q]) : A(0); };
  return {value(0), value(1), value(2), value(3)};
}

// ---- one element ----------------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ S forward_element(S u, const Parameters<Arithmetic<S>>& p) {
  return static_cast<S>(leaf<Math<S>>(static_cast<Arithmetic<S>>(u), p));
}

// Adds the element's parameter gradients to sum[0..3]; returns du.
template <class S>
__device__ __forceinline__ S backward_element(S u, S g, const Parameters<Arithmetic<S>>& p, Arithmetic<S>* sum) {
  using A = Arithmetic<S>;
  const A grad = static_cast<A>(g);
  const Partials<A> d = leaf_partials<Math<S>>(static_cast<A>(u), grad, p);
  sum[0] += d.p1;
  sum[1] += d.p2;
  sum[2] += d.p3;
  sum[3] += grad;
  return static_cast<S>(d.u);
}

template <class S>
struct BackwardPointers {
  const S* u;
  const S* grad;
  S* du;  // or null
  int64_t grad_stride;
};

// ---- rows -----------------------------------------------------------------------------------------------------------

// The slots (launch_plan.h) of one thread, one after another.
template <int N>
struct RowCursor {
  const RowsLaunch& r;
  int64_t k, row, vector;

  __device__ RowCursor(const RowsLaunch& launch, int64_t parameter, int64_t first_slot)
      : r(launch), k(parameter), row(first_slot / launch.vectors), vector(first_slot % launch.vectors) {}

  __device__ __forceinline__ bool in_range() const { return row < r.outer; }

  __device__ __forceinline__ void advance() {
    row += r.step_rows;
    vector += r.step_vectors;
    if (vector >= r.vectors) {
      vector -= r.vectors;
      ++row;
    }
  }

  // The slot's first element, and which of its N elements are the row's: [lo, hi).
  struct Slot {
    int64_t first;
    int lo, hi;
    __device__ __forceinline__ bool is_whole() const { return lo == 0 && hi == N; }
  };
  __device__ __forceinline__ Slot slot() const {
    if (!in_range()) return {0, 0, 0};
    const int64_t begin = (row * r.count + k) * r.inner, end = begin + r.inner;
    const int64_t first = begin / N * N + vector * N;
    return {first, first < begin ? static_cast<int>(begin - first) : 0,
            first + N <= end ? N : (first < end ? static_cast<int>(end - first) : 0)};
  }
};

template <class S, int N, int Unroll>
__global__ void __launch_bounds__(kMaxThreads) forward_rows(RowsLaunch r, FlatParameters parameters, const S* u, S* y) {
  for (int64_t item = blockIdx.x; item < r.count * r.splits; item += gridDim.x) {
    const int64_t k = item % r.count, split = item / r.count;
    const Parameters<Arithmetic<S>> p = load_parameters<Arithmetic<S>>(parameters, k);
    RowCursor<N> cursor(r, k, split * r.threads + threadIdx.x);
    while (cursor.in_range()) {
      typename RowCursor<N>::Slot slots[Unroll];
      Vector<S, N> v[Unroll];
#pragma unroll
      for (int j = 0; j < Unroll; ++j) {
        slots[j] = cursor.slot();
        if (slots[j].is_whole()) v[j] = load_vector<S, N>(u + slots[j].first);
        cursor.advance();
      }
#pragma unroll
      for (int j = 0; j < Unroll; ++j) {
        if (slots[j].is_whole()) {
#pragma unroll
          for (int e = 0; e < N; ++e) v[j].at[e] = forward_element(v[j].at[e], p);
          store_vector(y + slots[j].first, v[j]);
        } else {
#pragma unroll 1
          for (int64_t i = slots[j].first + slots[j].lo; i < slots[j].first + slots[j].hi; ++i)
            y[i] = forward_element(u[i], p);
        }
      }
    }
  }
}

// The block's sum of each thread's sum[0..3], in thread 0...3: thread q has that of sum[q]. All threads must call it.
template <class A>
__device__ __forceinline__ A block_sum(const A* sum) {
  A* const shared = reinterpret_cast<A*>(leaf_smem);  // [q][warp]
  const int warps = blockDim.x / kWarp;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    A s = sum[q];
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
    if (threadIdx.x % kWarp == 0) shared[q * warps + threadIdx.x / kWarp] = s;
  }
  __syncthreads();
  A total = 0;
  if (threadIdx.x < 4)
    for (int w = 0; w < warps; ++w) total += shared[threadIdx.x * warps + w];
  __syncthreads();  // before the next call writes
  return total;
}

// Where a block's sums go: to the gradients if they are whole, else to the workspace; nowhere if no gradient is wanted.
template <class A>
struct SumTarget {
  bool wanted;
  PartialSums layout;
  A* partial;
  void* dp[4];
  c10::ScalarType dp_dtype;

  __device__ __forceinline__ void store(int q, int64_t part, int64_t slot, A value) const {
    if (!layout.whole)
      partial[(part * 4 + q) * layout.fold * layout.count + slot] = value;
    else if (dp[q])
      store_as(dp[q], dp_dtype, slot, value);
  }
};

template <class S, int N, int Unroll>
__global__ void __launch_bounds__(kMaxThreads, 2)
    backward_rows(RowsLaunch r, FlatParameters parameters, BackwardPointers<S> a, SumTarget<Arithmetic<S>> target) {
  using A = Arithmetic<S>;
  for (int64_t item = blockIdx.x; item < r.count * r.splits; item += gridDim.x) {
    const int64_t k = item % r.count, split = item / r.count;
    const Parameters<A> p = load_parameters<A>(parameters, k);
    A sum[4] = {};
    RowCursor<N> cursor(r, k, split * r.threads + threadIdx.x);
    while (cursor.in_range()) {
      typename RowCursor<N>::Slot slots[Unroll];
      Vector<S, N> u[Unroll], g[Unroll];
#pragma unroll
      for (int j = 0; j < Unroll; ++j) {
        slots[j] = cursor.slot();
        if (slots[j].is_whole()) {
          u[j] = load_vector<S, N>(a.u + slots[j].first);
          if (a.grad_stride) g[j] = load_vector<S, N>(a.grad + slots[j].first);
        }
        cursor.advance();
      }
#pragma unroll
      for (int j = 0; j < Unroll; ++j) {
        if (slots[j].is_whole()) {
#pragma unroll
          for (int e = 0; e < N; ++e)
            u[j].at[e] = backward_element(u[j].at[e], a.grad_stride ? g[j].at[e] : *a.grad, p, sum);
          if (a.du) store_vector(a.du + slots[j].first, u[j]);
        } else {
#pragma unroll 1
          for (int64_t i = slots[j].first + slots[j].lo; i < slots[j].first + slots[j].hi; ++i) {
            const S du = backward_element(a.u[i], a.grad[i * a.grad_stride], p, sum);
            if (a.du) a.du[i] = du;
          }
        }
      }
    }
    if (!target.wanted) continue;
    const A total = block_sum(sum);
#pragma unroll
    for (int q = 0; q < 4; ++q)
      if (static_cast<int>(threadIdx.x) == q) target.store(q, split, k, total);
  }
}

// ---- columns --------------------------------------------------------------------------------------------------------

// A thread's place: N columns, and the rows first_row, first_row + step, ... A vector of N is whole in the rows before
// whole_rows; in the matrix's last row, `rest` of its elements may be left over.
template <int N>
struct ColumnThread {
  int64_t column, first_row, step, whole_rows;
  int tx, ty, rest;
  bool active;

  __device__ __forceinline__ explicit ColumnThread(const ColumnsLaunch& c)
      : tx(threadIdx.x % c.tx), ty(threadIdx.x / c.tx) {
    column = (static_cast<int64_t>(blockIdx.x) * c.tx + tx) * N;
    first_row = static_cast<int64_t>(blockIdx.y) * c.ty + ty;
    step = static_cast<int64_t>(gridDim.y) * c.ty;
    const int64_t in_tail = c.columns.tail - column;
    whole_rows = c.columns.rows + (in_tail >= N);
    rest = in_tail > 0 && in_tail < N && c.columns.rows % step == first_row ? static_cast<int>(in_tail) : 0;
    active = ty < c.ty && column < c.columns.width;
  }
};

template <class A, int N>
__device__ __forceinline__ void load_column_parameters(const ColumnsLaunch& c, const FlatParameters& f, int64_t column,
                                                       Parameters<A>* p) {
  int64_t k = column / c.inner % c.count, within = column % c.inner;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    p[e] = load_parameters<A>(f, k);
    if (++within == c.inner) {
      within = 0;
      if (++k == c.count) k = 0;
    }
  }
}

template <class S, int N, int Unroll>
__global__ void __launch_bounds__(kMaxThreads)
    forward_columns(ColumnsLaunch c, FlatParameters parameters, const S* u, S* y) {
  const ColumnThread<N> t(c);
  if (!t.active) return;
  Parameters<Arithmetic<S>> p[N];
  load_column_parameters<Arithmetic<S>, N>(c, parameters, t.column, p);
  for (int64_t row = t.first_row; row < t.whole_rows; row += Unroll * t.step) {
    Vector<S, N> v[Unroll];
#pragma unroll
    for (int j = 0; j < Unroll; ++j)
      if (row + j * t.step < t.whole_rows)
        v[j] = load_vector<S, N>(u + (row + j * t.step) * c.columns.width + t.column);
#pragma unroll
    for (int j = 0; j < Unroll; ++j) {
      if (row + j * t.step >= t.whole_rows) break;
#pragma unroll
      for (int e = 0; e < N; ++e) v[j].at[e] = forward_element(v[j].at[e], p[e]);
      store_vector(y + (row + j * t.step) * c.columns.width + t.column, v[j]);
    }
  }
  const int64_t tail = c.columns.rows * c.columns.width + t.column;
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (e < t.rest) y[tail + e] = forward_element(u[tail + e], p[e]);
}

template <class S, int N, int Unroll>
__global__ void __launch_bounds__(kMaxThreads, 2)
    backward_columns(ColumnsLaunch c, FlatParameters parameters, BackwardPointers<S> a,
                     SumTarget<Arithmetic<S>> target) {
  using A = Arithmetic<S>;
  const ColumnThread<N> t(c);
  A sum[N][4] = {};
  if (t.active) {
    Parameters<A> p[N];
    load_column_parameters<A, N>(c, parameters, t.column, p);
    for (int64_t row = t.first_row; row < t.whole_rows; row += Unroll * t.step) {
      Vector<S, N> u[Unroll], g[Unroll];
#pragma unroll
      for (int j = 0; j < Unroll; ++j)
        if (row + j * t.step < t.whole_rows) {
          const int64_t i = (row + j * t.step) * c.columns.width + t.column;
          u[j] = load_vector<S, N>(a.u + i);
          if (a.grad_stride) g[j] = load_vector<S, N>(a.grad + i);
        }
#pragma unroll
      for (int j = 0; j < Unroll; ++j) {
        if (row + j * t.step >= t.whole_rows) break;
#pragma unroll
        for (int e = 0; e < N; ++e)
          u[j].at[e] = backward_element(u[j].at[e], a.grad_stride ? g[j].at[e] : *a.grad, p[e], sum[e]);
        if (a.du) store_vector(a.du + (row + j * t.step) * c.columns.width + t.column, u[j]);
      }
    }
    const int64_t tail = c.columns.rows * c.columns.width + t.column;
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (e < t.rest) {
        const S du = backward_element(a.u[tail + e], a.grad[(tail + e) * a.grad_stride], p[e], sum[e]);
        if (a.du) a.du[tail + e] = du;
      }
  }

  if (!target.wanted) return;
  const int columns = c.tx * N;
  if (c.ty == 1 && c.inner == 1) {
    if (!t.active) return;
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int e = 0; e < N; ++e) target.store(q, blockIdx.y, t.column + e, sum[e][q]);
    return;
  }
  A* const shared = reinterpret_cast<A*>(leaf_smem);  // [ty][q][column]
  if (t.ty < c.ty) {
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int e = 0; e < N; ++e) shared[(t.ty * 4 + q) * columns + t.tx * N + e] = sum[e][q];
  }
  __syncthreads();
  const int inner = static_cast<int>(c.inner), slots = columns / inner;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    for (int s = threadIdx.x; s < slots; s += blockDim.x) {
      const int64_t slot = static_cast<int64_t>(blockIdx.x) * slots + s;
      if (slot >= c.slots) break;
      A total = 0;
      for (int ty = 0; ty < c.ty; ++ty)
        for (int i = 0; i < inner; ++i) total += shared[(ty * 4 + q) * columns + s * inner + i];
      target.store(q, blockIdx.y, slot, total);
    }
  }
}

// ---- partial sums to gradients --------------------------------------------------------------------------------------

template <class A>
__global__ void __launch_bounds__(kMaxThreads) finish(FinishLaunch f, SumTarget<A> target) {
  A* const shared = reinterpret_cast<A*>(leaf_smem);  // [q][ky][kx]
  const int x = threadIdx.x % f.kx, y = threadIdx.x / f.kx;
  const int64_t count = f.sums.count, fold = f.sums.fold;
  for (int64_t k0 = static_cast<int64_t>(blockIdx.x) * f.kx; k0 < count; k0 += static_cast<int64_t>(gridDim.x) * f.kx) {
    A sum[4] = {};
    if (k0 + x < count)
      for (int64_t j = y; j < f.sums.parts * fold; j += f.ky)
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[q] += target.partial[((j / fold * 4 + q) * fold + j % fold) * count + k0 + x];
#pragma unroll
    for (int q = 0; q < 4; ++q) shared[q * blockDim.x + threadIdx.x] = sum[q];
    for (int half = f.ky / 2; half > 0; half /= 2) {
      __syncthreads();
      if (y < half)
#pragma unroll
        for (int q = 0; q < 4; ++q)
          shared[q * blockDim.x + threadIdx.x] += shared[q * blockDim.x + threadIdx.x + half * f.kx];
    }
    if (y == 0 && k0 + x < count)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (target.dp[q]) store_as(target.dp[q], target.dp_dtype, k0 + x, shared[q * blockDim.x + threadIdx.x]);
    __syncthreads();  // before the next round writes
  }
}

}  // namespace cuda
}  // namespace leaf_cuda
