// The CUDA kernels: an operation (leaf_operations.h) over rows and over columns (launch_plan.h), and the sum of partial
// sums.
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
  static __device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }
  static __device__ __forceinline__ double select(double z, double a, double b) { return z >= 0 ? a : b; }
};

struct FloatMath {
  using T = float;
  static __device__ __forceinline__ float exp_neg_abs(float z) { return expf(-fabsf(z)); }
  static __device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
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

// An operation's sets of parameters at index k.
template <class A, int sets>
__device__ __forceinline__ void load_parameters(const FlatParameters& f, int64_t k, Parameters<A>* p) {
  const auto value = [&](int q) { return f.p[q] ? load_as<A>(f.p[q], f.dtype, k * f.stride[q]) : A(0); };
#pragma unroll
  for (int set = 0; set < sets; ++set)
    p[set] = {value(4 * set), value(4 * set + 1), value(4 * set + 2), value(4 * set + 3)};
}

// ---- operands -------------------------------------------------------------------------------------------------------

// An operation's inputs and outputs.
template <class Op, class S>
struct Operands {
  const S* in[Op::inputs];
  int stride[Op::inputs];  // 1, or 0 where all of the input is one element; u's is 1
  S* out[Op::outputs];     // or null
  // Of pitched operations: elements from one line of the operand to the next.
  int64_t in_pitch[Op::pitched ? Op::inputs : 1], out_pitch[Op::pitched ? Op::outputs : 1];

  // An element, in each operand: `within` a line.
  struct Place {
    int64_t line, within;
    __device__ __forceinline__ int64_t at(int64_t pitch) const { return Op::pitched ? line * pitch + within : within; }
  };
  __device__ __forceinline__ int64_t in_at(int k, const Place& place) const {
    return place.at(in_pitch[Op::pitched ? k : 0]);
  }
  __device__ __forceinline__ int64_t out_at(int k, const Place& place) const {
    return place.at(out_pitch[Op::pitched ? k : 0]);
  }

  template <int N>
  struct Loaded {
    Vector<S, N> in[Op::inputs];
  };

  // N consecutive elements of each input, or N times the one there is.
  template <int N>
  __device__ __forceinline__ void load(const Place& place, Loaded<N>& to) const {
#pragma unroll
    for (int k = 0; k < Op::inputs; ++k) {
      if (k == 0 || stride[k]) {
        to.in[k] = load_vector<S, N>(in[k] + in_at(k, place));
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e) to.in[k].at[e] = *in[k];
      }
    }
  }

  // Runs the operation on what was loaded from there, in the same registers, and stores the outputs. With PerElement
  // each of the N elements has its own parameters p[e·sets] and sums sum[e·sums], else they share p and sum.
  template <bool PerElement, int N>
  __device__ __forceinline__ void run(const Place& place, Loaded<N>& loaded, const Parameters<Arithmetic<S>>* p,
                                      Arithmetic<S>* sum) const {
    static_assert(Op::outputs <= Op::inputs);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      Arithmetic<S> x[Op::inputs], y[Op::outputs];
#pragma unroll
      for (int k = 0; k < Op::inputs; ++k) x[k] = static_cast<Arithmetic<S>>(loaded.in[k].at[e]);
      Op::template apply<Math<S>>(x, p + PerElement * e * Op::sets, y, sum + PerElement * e * Op::sums);
#pragma unroll
      for (int k = 0; k < Op::outputs; ++k) loaded.in[k].at[e] = static_cast<S>(y[k]);
    }
#pragma unroll
    for (int k = 0; k < Op::outputs; ++k)
      if (!Op::sums || out[k]) store_vector(out[k] + out_at(k, place), loaded.in[k]);
  }

  // One element, loaded and run.
  __device__ __forceinline__ void run_one(const Place& place, const Parameters<Arithmetic<S>>* p,
                                          Arithmetic<S>* sum) const {
    Loaded<1> loaded;
    load(place, loaded);
    run<false>(place, loaded, p, sum);
  }
};

// Blocks that a multiprocessor is to hold at once, which bounds the registers: a thread has the parameters and the sums
// of a column in them.
template <class Op, class S>
constexpr int kMinBlocks = Op::inputs == 1                               ? 3
                           : Op::sums > 12 && sizeof(Arithmetic<S>) == 8 ? 1
                                                                         : 2;

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
    const int64_t begin = row * r.pitch + k * r.inner, end = begin + r.inner;
    const int64_t first = begin / N * N + vector * N;
    return {first, first < begin ? static_cast<int>(begin - first) : 0,
            first + N <= end ? N : (first < end ? static_cast<int>(end - first) : 0)};
  }
};

// The block's sum of each thread's sum[0], sum[1], ...: thread q has that of sum[q]. All threads must call it.
template <int sums, class A>
__device__ __forceinline__ A block_sum(const A* sum) {
  A* const shared = reinterpret_cast<A*>(leaf_smem);  // [q][warp]
  const int warps = blockDim.x / kWarp;
#pragma unroll
  for (int q = 0; q < sums; ++q) {
    A s = sum[q];
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
    if (threadIdx.x % kWarp == 0) shared[q * warps + threadIdx.x / kWarp] = s;
  }
  __syncthreads();
  A total = 0;
  if (threadIdx.x < sums)
    for (int w = 0; w < warps; ++w) total += shared[threadIdx.x * warps + w];
  __syncthreads();  // before the next call writes
  return total;
}

// Where a block's sums go: to the gradients if they are whole, else to the workspace; nowhere if no gradient is wanted.
template <int sums, class A>
struct SumTarget {
  bool wanted;
  PartialSums layout;
  A* partial;
  void* dp[sums ? sums : 1];
  c10::ScalarType dp_dtype;

  __device__ __forceinline__ void store(int q, int64_t part, int64_t slot, A value) const {
    if (!layout.whole)
      partial[(part * sums + q) * layout.fold * layout.count + slot] = value;
    else if (dp[q])
      store_as(dp[q], dp_dtype, slot, value);
  }
};

template <class Op, class S, int N, int Unroll>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<Op, S>)
    rows(RowsLaunch r, FlatParameters parameters, Operands<Op, S> a, SumTarget<Op::sums, Arithmetic<S>> target) {
  using A = Arithmetic<S>;
  for (int64_t item = blockIdx.x; item < r.count * r.splits; item += gridDim.x) {
    const int64_t k = item % r.count, split = item / r.count;
    Parameters<A> p[Op::sets];
    load_parameters<A, Op::sets>(parameters, k, p);
    A sum[kSums<Op>] = {};
    RowCursor<N> cursor(r, k, split * r.threads + threadIdx.x);
    while (cursor.in_range()) {
      typename RowCursor<N>::Slot slots[Unroll];
      typename Operands<Op, S>::template Loaded<N> loaded[Unroll];
#pragma unroll
      for (int j = 0; j < Unroll; ++j) {
        slots[j] = cursor.slot();
        if (slots[j].is_whole()) a.load({0, slots[j].first}, loaded[j]);
        cursor.advance();
      }
#pragma unroll
      for (int j = 0; j < Unroll; ++j) {
        if (slots[j].is_whole()) {
          a.template run<false>({0, slots[j].first}, loaded[j], p, sum);
        } else {
#pragma unroll 1
          for (int64_t i = slots[j].first + slots[j].lo; i < slots[j].first + slots[j].hi; ++i)
            a.run_one({0, i}, p, sum);
        }
      }
    }
    if constexpr (Op::sums > 0) {
      if (!target.wanted) continue;
      const A total = block_sum<Op::sums>(sum);
#pragma unroll
      for (int q = 0; q < Op::sums; ++q)
        if (static_cast<int>(threadIdx.x) == q) target.store(q, split, k, total);
    }
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

template <class A, int N, int sets>
__device__ __forceinline__ void load_column_parameters(const ColumnsLaunch& c, const FlatParameters& f, int64_t column,
                                                       Parameters<A>* p) {
  int64_t k = column / c.inner % c.count, within = column % c.inner;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    load_parameters<A, sets>(f, k, p + e * sets);
    if (++within == c.inner) {
      within = 0;
      if (++k == c.count) k = 0;
    }
  }
}

// Whether each thread stores its own columns' sums, for there are no others to add. (Not of many: their code would be
// far longer than the rest.)
template <class Op>
__host__ __device__ __forceinline__ bool sums_alone(const ColumnsLaunch& c) {
  return Op::sums <= 4 && c.ty == 1 && c.inner == 1;
}

template <class Op, class S, int N, int Unroll>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<Op, S>)
    columns(ColumnsLaunch c, FlatParameters parameters, Operands<Op, S> a, SumTarget<Op::sums, Arithmetic<S>> target) {
  using A = Arithmetic<S>;
  const ColumnThread<N> t(c);
  A sum[N * kSums<Op>] = {};
  if (t.active) {
    Parameters<A> p[N * Op::sets];
    load_column_parameters<A, N, Op::sets>(c, parameters, t.column, p);
    // A row of the matrix is one line of the operands or more.
    const int64_t lines = Op::pitched ? c.columns.width / c.line : 0, first_line = Op::pitched ? t.column / c.line : 0;
    const int64_t within = Op::pitched ? t.column % c.line : t.column;
    const auto place = [&](int64_t row, int e) -> typename Operands<Op, S>::Place {
      return {row * lines + first_line, (Op::pitched ? 0 : row * c.columns.stride) + within + e};
    };
    for (int64_t row = t.first_row; row < t.whole_rows; row += Unroll * t.step) {
      typename Operands<Op, S>::template Loaded<N> loaded[Unroll];
#pragma unroll
      for (int j = 0; j < Unroll; ++j)
        if (row + j * t.step < t.whole_rows) a.load(place(row + j * t.step, 0), loaded[j]);
#pragma unroll
      for (int j = 0; j < Unroll; ++j) {
        if (row + j * t.step >= t.whole_rows) break;
        a.template run<true>(place(row + j * t.step, 0), loaded[j], p, sum);
      }
    }
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (e < t.rest) a.run_one(place(c.columns.rows, e), p + e * Op::sets, sum + e * Op::sums);
  }

  if (!Op::sums || !target.wanted) return;
  const int width = c.tx * N;
  if (sums_alone<Op>(c)) {
    if (!t.active) return;
#pragma unroll
    for (int q = 0; q < Op::sums; ++q)
#pragma unroll
      for (int e = 0; e < N; ++e) target.store(q, blockIdx.y, t.column + e, sum[e * Op::sums + q]);
    return;
  }
  A* const shared = reinterpret_cast<A*>(leaf_smem);  // [ty][q][column]
  if (t.ty < c.ty) {
#pragma unroll
    for (int q = 0; q < Op::sums; ++q)
#pragma unroll
      for (int e = 0; e < N; ++e) shared[(t.ty * Op::sums + q) * width + t.tx * N + e] = sum[e * Op::sums + q];
  }
  __syncthreads();
  const int inner = static_cast<int>(c.inner), slots = width / inner;
#pragma unroll(Op::sums <= 4 ? 4 : 1)
  for (int q = 0; q < Op::sums; ++q) {
    for (int s = threadIdx.x; s < slots; s += blockDim.x) {
      const int64_t slot = static_cast<int64_t>(blockIdx.x) * slots + s;
      if (slot >= c.slots) break;
      A total = 0;
      for (int ty = 0; ty < c.ty; ++ty)
        for (int i = 0; i < inner; ++i) total += shared[(ty * Op::sums + q) * width + s * inner + i];
      target.store(q, blockIdx.y, slot, total);
    }
  }
}

// ---- partial sums to gradients --------------------------------------------------------------------------------------

// Block y adds up the sums of gradient y.
template <int sums, class A>
__global__ void __launch_bounds__(kMaxThreads) finish(FinishLaunch f, SumTarget<sums, A> target) {
  A* const shared = reinterpret_cast<A*>(leaf_smem);  // [ky][kx]
  const int x = threadIdx.x % f.kx, y = threadIdx.x / f.kx;
  const int64_t count = f.sums.count, fold = f.sums.fold, q = blockIdx.y;
  for (int64_t k0 = static_cast<int64_t>(blockIdx.x) * f.kx; k0 < count; k0 += static_cast<int64_t>(gridDim.x) * f.kx) {
    A sum = 0;
    if (k0 + x < count)
      for (int64_t j = y; j < f.sums.parts * fold; j += f.ky)
        sum += target.partial[((j / fold * sums + q) * fold + j % fold) * count + k0 + x];
    shared[threadIdx.x] = sum;
    for (int half = f.ky / 2; half > 0; half /= 2) {
      __syncthreads();
      if (y < half) shared[threadIdx.x] += shared[threadIdx.x + half * f.kx];
    }
    if (y == 0 && k0 + x < count) {
#pragma unroll
      for (int which = 0; which < sums; ++which)
        if (which == q && target.dp[which]) store_as(target.dp[which], target.dp_dtype, k0 + x, shared[threadIdx.x]);
    }
    __syncthreads();  // before the next round writes
  }
}

}  // namespace cuda
}  // namespace leaf_cuda
