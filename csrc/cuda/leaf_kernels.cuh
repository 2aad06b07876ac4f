// The CUDA kernels: an operation (leaf_operations.h) over rows, an operation over columns (launch_plan.h), and the
// kernel that adds up partial sums.
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

// 1/x for x in [1, 2], within 1 ulp; 2^x where the result is not subnormal, within 2 ulps. One instruction each: CUDA's
// __fdividef and exp2f take three or four, to handle every x.
__device__ __forceinline__ float approximate_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}
__device__ __forceinline__ float approximate_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

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
  // With one Newton step, which avoids the slow path of a full division.
  static __device__ __forceinline__ float reciprocal(float x) {
    const float r = approximate_reciprocal(x);
    return fmaf(r, fmaf(-x, r, 1.0f), r);
  }
  static __device__ __forceinline__ float select(float z, float a, float b) { return z >= 0 ? a : b; }
};

// For float16 and bfloat16: errors of some 2^-21·(1 + |z|) are far below what these types resolve.
struct ApproximateMath : FloatMath {
  // e^(−|z|) is the square of 2^(−|z|·log2(e)/2): this root is normal even where e^(−|z|) is subnormal.
  static constexpr float exponent_scale = 0.5f * 1.44269504f;
  static __device__ __forceinline__ float exp_neg_abs(float z) {
    const float root = approximate_exp2(-fabsf(z));
    return root * root;
  }
  static __device__ __forceinline__ float reciprocal(float x) { return approximate_reciprocal(x); }
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

// N elements, and the word that they move as in one instruction: 16 bytes, or a single element.
template <class S, int N>
struct Vector {
  S at[N];
};
template <class S, int N>
using Word = std::conditional_t<N == 1, S, uint4>;

template <class S, int N>
__device__ __forceinline__ Word<S, N> load_word(const S* p) {
  static_assert(sizeof(Word<S, N>) == N * sizeof(S));
  return *reinterpret_cast<const Word<S, N>*>(p);
}

template <class S, int N>
__device__ __forceinline__ Vector<S, N> elements(const Word<S, N>& word) {
  Vector<S, N> v;
  memcpy(&v, &word, sizeof(v));
  return v;
}

template <class S, int N>
__device__ __forceinline__ Word<S, N> word_of(const Vector<S, N>& v) {
  Word<S, N> word;
  static_assert(sizeof(v) == sizeof(word));
  memcpy(&word, &v, sizeof(v));
  return word;
}

// Stores 16 bytes to global memory in one instruction. By PTX: nvcc may split a plain assignment into narrower stores.
__device__ __forceinline__ void store_word(void* p, const uint4& word) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
#else
  *static_cast<uint4*>(p) = word;
#endif
}

template <class S, int N>
__device__ __forceinline__ void store_vector(S* p, const Vector<S, N>& v) {
  if constexpr (N == 1)
    *p = v.at[0];
  else
    store_word(p, word_of(v));
}

// Calls f with a zero of `type`, the dtype of parameters or of their gradients: the storage or the arithmetic type.
template <class S, class F>
__device__ __forceinline__ void with_type(c10::ScalarType type, const F& f) {
  if (std::is_same_v<S, Arithmetic<S>> || type == c10::CppTypeToScalarType<S>::value)
    f(S());
  else
    f(Arithmetic<S>());
}

// Parameter q, of type P, at an index and the N − 1 columns after it. All values are loaded before one is used.
template <class P, int N>
struct LoadedParameter {
  static constexpr int per_word = N == 1 ? 1 : 16 / sizeof(P);
  static_assert(N % per_word == 0);
  Word<P, per_word> words[N / per_word];
  P one;  // where N is 1 or all columns have one value

  __device__ __forceinline__ void load(const ParameterArgs& a, int q, const ParameterIndex& index) {
    const P* const p = static_cast<const P*>(a.p[q]) + a.strides[q].at(index);
    if (N == 1 || !a.strides[q].column) {
      one = a.p[q] ? *p : P();
    } else {
#pragma unroll
      for (int w = 0; w < N / per_word; ++w) words[w] = load_word<P, per_word>(p + w * per_word);
    }
  }
  template <class A>
  __device__ __forceinline__ A value(const ParameterArgs& a, int q, int e) const {
    if (N == 1 || !a.strides[q].column) return static_cast<A>(one);
    return static_cast<A>(elements<P, per_word>(words[e / per_word]).at[e % per_word]);
  }
};

// Loads an operation's sets of parameters at an index and the N − 1 columns after it into p[e·sets + set].
template <class P, int sets, int N, class A>
__device__ __forceinline__ void load_parameters(const ParameterArgs& a, const ParameterIndex& index, Parameters<A>* p) {
  LoadedParameter<P, N> loaded[4 * sets];
#pragma unroll
  for (int q = 0; q < 4 * sets; ++q) loaded[q].load(a, q, index);
#pragma unroll
  for (int set = 0; set < sets; ++set)
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const auto value = [&](int q) { return loaded[4 * set + q].template value<A>(a, 4 * set + q, e); };
      p[e * sets + set] = {value(0), value(1), value(2), value(3)};
    }
}

// ---- operands -------------------------------------------------------------------------------------------------------

// An operation's inputs and outputs.
template <class Op, class S>
struct Operands {
  const S* in[Op::inputs];
  int stride[Op::inputs];  // 1, or 0 for an input that is one repeated element; u's is 1
  S* out[Op::outputs];     // or null
  // For pitched operations: elements from one line of the operand to the next.
  int64_t in_pitch[Op::pitched ? Op::inputs : 1], out_pitch[Op::pitched ? Op::outputs : 1];

  // An element's position in every operand: a line, and the offset `within` it; in unpitched operations, `within`
  // alone.
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

  // Loaded values stay in words until they are used: taking them apart would make the thread wait for the load.
  template <int N>
  struct Loaded {
    Word<S, N> in[Op::inputs];
  };

  // N copies of each input that is one repeated element.
  template <int N>
  __device__ __forceinline__ Loaded<N> load_repeated() const {
    Loaded<N> loaded = {};
#pragma unroll
    for (int k = 1; k < Op::inputs; ++k) {
      if (!(Op::repeatable >> k & 1) || stride[k]) continue;
      Vector<S, N> v;
#pragma unroll
      for (int e = 0; e < N; ++e) v.at[e] = *in[k];
      memcpy(&loaded.in[k], &v, sizeof(v));
    }
    return loaded;
  }

  // N consecutive elements of each input.
  template <int N>
  __device__ __forceinline__ Loaded<N> load(const Place& place, const Loaded<N>& repeated) const {
    Loaded<N> loaded;
#pragma unroll
    for (int k = 0; k < Op::inputs; ++k) {
      if (!(Op::repeatable >> k & 1) || stride[k])
        loaded.in[k] = load_word<S, N>(in[k] + in_at(k, place));
      else
        loaded.in[k] = repeated.in[k];
    }
    return loaded;
  }

  // The first n of N consecutive elements of each input, and zeros for the others, which are beyond its end.
  template <int N>
  __device__ __forceinline__ Loaded<N> load_part(const Place& place, int n, const Loaded<N>& repeated) const {
    Loaded<N> loaded = repeated;
#pragma unroll
    for (int k = 0; k < Op::inputs; ++k) {
      if ((Op::repeatable >> k & 1) && !stride[k]) continue;
      Vector<S, N> v = {};
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (e < n) v.at[e] = in[k][in_at(k, place) + e];
      memcpy(&loaded.in[k], &v, sizeof(v));
    }
    return loaded;
  }

  // Runs the operation on what was loaded from `place`, and stores the outputs there. With PerElement each of the N
  // elements has its own parameters p[e·sets] and sums sum[e·sums], else they share p and sum. With Part only some
  // elements are wanted: those from `shift` on or, if it is negative, all but the last −shift. All N are computed, so
  // that the warp does not diverge, but unwanted outputs are not stored, and unwanted shares in the sums are undone.
  template <bool PerElement, bool Part, int N>
  __device__ __forceinline__ void run(const Place& place, const Loaded<N>& loaded, const Parameters<Arithmetic<S>>* p,
                                      Arithmetic<S>* sum, int shift = 0) const {
    const auto is_wanted = [&](int e) { return !Part || static_cast<unsigned>(e - shift) < N; };
    Vector<S, N> x[Op::inputs], y[Op::outputs];
#pragma unroll
    for (int k = 0; k < Op::inputs; ++k) x[k] = elements<S, N>(loaded.in[k]);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const auto input = [&](int k) { return x[k].at[e]; };
      const auto output = [&](int k, S value) { y[k].at[e] = value; };
      Arithmetic<S>* const total = sum + PerElement * e * Op::sums;
      Arithmetic<S> before[kSums<Op>];
#pragma unroll
      for (int q = 0; q < Op::sums; ++q) before[q] = total[q];
      apply(input, p + PerElement * e * Op::sets, output, total);
#pragma unroll
      for (int q = 0; q < Op::sums; ++q) total[q] = is_wanted(e) ? total[q] : before[q];
    }
#pragma unroll
    for (int k = 0; k < Op::outputs; ++k) {
      if (Op::sums && !out[k]) continue;
      S* const first = out[k] + out_at(k, place);
      if (!Part || shift == 0) {
        store_vector(first, y[k]);
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e)
          if (is_wanted(e)) first[e] = y[k].at[e];
      }
    }
  }

 private:
  template <class Input, class Output>
  static __device__ __forceinline__ void apply(const Input& input, const Parameters<Arithmetic<S>>* p,
                                               const Output& output, Arithmetic<S>* sum) {
    Arithmetic<S> x[Op::inputs], y[Op::outputs];
#pragma unroll
    for (int k = 0; k < Op::inputs; ++k) x[k] = static_cast<Arithmetic<S>>(input(k));
    leaf_cuda::apply<Op, Math<S>>(x, p, y, sum);
#pragma unroll
    for (int k = 0; k < Op::outputs; ++k) output(k, static_cast<S>(y[k]));
  }
};

// Blocks that a multiprocessor is to hold at once, which bounds a thread's registers: as many as leave enough of them,
// on each architecture, for what a thread has loaded and, over columns, for the parameters and sums of its N columns
// (tests/kernel_resources.py). Compute capability 7.5 holds at most four.
template <class Op, class S, int N, bool ByRows>
constexpr int kMinBlocks = [] {
  constexpr bool wide = sizeof(Arithmetic<S>) == 8;
  constexpr int of_elements = Op::sets < 3 ? 4 : Op::sums < 20 ? 3 : 2;
  if (N == 1) return wide ? (of_elements + 1) / 2 : of_elements;
  return !wide && Op::inputs <= 2 && (ByRows || N < 8) ? 3 : 2;
}();

// Calls step(is_there) for each full group of Unroll of the n items, then once for the remainder. is_there(j) tells
// whether the step has an item j; for a full group it is true at compile time.
template <int Unroll, class F>
__device__ __forceinline__ void for_each_step(int64_t n, const F& step) {
  for (; n >= Unroll; n -= Unroll) step([](int) { return true; });
  if (n > 0) step([&](int j) { return j < n; });
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Walks through the slots (RowsLaunch) of one thread. Aligned: every vector is whole.
template <int N, bool Aligned>
struct RowCursor {
  const RowsLaunch& r;
  int64_t vector;  // the slot's index in its row
  int64_t at;      // the slot's first element; where not Aligned, its row's first

  __device__ RowCursor(const RowsLaunch& launch, int64_t k, int64_t first_slot)
      : r(launch),
        vector(first_slot % r.vectors),
        at(first_slot / r.vectors * r.pitch + k * r.inner + (Aligned ? vector * N : 0)) {}

  __device__ __forceinline__ void advance() {
    at += r.step;
    vector += r.step_vectors;
    if (vector >= r.vectors) {
      vector -= r.vectors;
      at += r.next_row;
    }
  }

  // The aligned vector of a slot: N elements from `first`, a multiple of N, and which of them are the row's (`shift` of
  // Operands::run): in the row's first vector those from `shift` on, in others all but the last −shift. An empty slot,
  // past the row's end, has shift N, so that none is, and loads a vector of the row instead: the second before it, the
  // nearest that is sure to be whole.
  struct Slot {
    int64_t first;
    int shift;
  };
  __device__ __forceinline__ Slot slot() const {
    if (Aligned) return {at, 0};
    const int offset = static_cast<int>(at & (N - 1));
    const int64_t within = vector * N, left = r.inner + offset - within;
    if (left <= 0) return {at - offset + within - 2 * N, N};
    return {at - offset + within, vector ? static_cast<int>(min(left, int64_t{N})) - N : offset};
  }
};

// The sums of sum[0], sum[1], ... over the block's threads: thread q returns that of sum[q]. All threads must call it.
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

// Where a block's sums go: to the gradients if they are whole, else to the workspace; nowhere if they are not wanted.
template <int sums, class S>
struct SumTarget {
  bool wanted;
  PartialSums layout;
  Arithmetic<S>* partial;
  c10::ScalarType dp_dtype;
  ParameterMatrix matrix;
  void* dp[sums ? sums : 1];
  ParameterStrides dp_strides[sums ? sums : 1];

  __device__ __forceinline__ void store_gradient(int q, int64_t k, Arithmetic<S> value) const {
    const int64_t at = dp_strides[q].at(matrix.at(k));
    with_type<S>(dp_dtype, [&](auto zero) {
      using P = decltype(zero);
      static_cast<P*>(dp[q])[at] = static_cast<P>(value);
    });
  }
  // place: part · count + parameter
  __device__ __forceinline__ void store(int q, int64_t place, Arithmetic<S> value) const {
    if (!dp[q]) return;
    if (!layout.whole)
      partial[q * layout.parts * layout.count + place] = value;
    else
      store_gradient(q, place, value);
  }
};

// Runs the operation on a thread's share of parameter k's rows.
template <bool Aligned, class Op, class S, int N, int Unroll>
__device__ __forceinline__ void run_rows(const RowsLaunch& r, int64_t k, int64_t split, const Operands<Op, S>& a,
                                         const typename Operands<Op, S>::template Loaded<N>& repeated,
                                         const Parameters<Arithmetic<S>>* p, Arithmetic<S>* sum) {
  const int64_t first_slot = split * r.threads + threadIdx.x;
  const bool has_rest = !Aligned && k == r.count - 1 && first_slot == r.rest_thread;
  // Each step is first added up on its own: its sum and `sum` then both have few terms and lose little accuracy.
  const auto add = [&](const Arithmetic<S>* share) {
#pragma unroll
    for (int q = 0; q < Op::sums; ++q) sum[q] += share[q];
  };
  RowCursor<N, Aligned> cursor(r, k, first_slot);
  for_each_step<Unroll>(r.slots.of(first_slot) - has_rest, [&](const auto& is_there) {
    typename RowCursor<N, Aligned>::Slot slots[Unroll];
    typename Operands<Op, S>::template Loaded<N> loaded[Unroll] = {};  // zeroed, else nvcc puts it on the stack
#pragma unroll
    for (int j = 0; j < Unroll; ++j) {
      slots[j] = cursor.slot();
      // A vector that two rows share is loaded whole for both, so that no load waits for another.
      if (is_there(j)) loaded[j] = a.load({0, slots[j].first}, repeated);
      cursor.advance();
    }
    Arithmetic<S> share[kSums<Op>] = {};
#pragma unroll
    for (int j = 0; j < Unroll; ++j) {
      const auto& slot = slots[j];
      if (is_there(j)) a.template run<false, !Aligned>({0, slot.first}, loaded[j], p, share, slot.shift);
    }
    add(share);
  });
  if (has_rest) {
    const typename Operands<Op, S>::Place place = {0, r.end - r.rest};
    Arithmetic<S> share[kSums<Op>] = {};
    a.template run<false, true>(place, a.load_part(place, r.rest, repeated), p, share, r.rest - N);
    add(share);
  }
}

template <class Op, class S, int N, int Unroll>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<Op, S, N, true>)
    rows(RowsLaunch r, ParameterArgs parameters, Operands<Op, S> a,
         const __grid_constant__ SumTarget<Op::sums, S> target) {
  using A = Arithmetic<S>;
  const auto repeated = a.template load_repeated<N>();
  for (int64_t item = blockIdx.x; item < r.items; item += gridDim.x) {
    const int64_t k = item % r.count, split = item / r.count;  // so `item` is the sums' place
    const ParameterIndex index = parameters.matrix.at(k);
    Parameters<A> p[Op::sets];
    with_type<S>(parameters.dtype,
                 [&](auto zero) { load_parameters<decltype(zero), Op::sets, 1>(parameters, index, p); });
    A sum[kSums<Op>] = {};
    if (N == 1 || r.aligned)
      run_rows<true, Op, S, N, Unroll>(r, k, split, a, repeated, p, sum);
    else
      run_rows<false, Op, S, N, Unroll>(r, k, split, a, repeated, p, sum);
    if constexpr (Op::sums > 0) {
      if (!target.wanted) continue;
      const A total = block_sum<Op::sums>(sum);
      if (threadIdx.x < Op::sums) target.store(threadIdx.x, item, total);
    }
  }
}

// ---- columns --------------------------------------------------------------------------------------------------------

// The part of the matrix that a thread processes: N columns, in the rows first_row, first_row + step, ..., of which
// whole_rows have all N. In the matrix's partial last row, only the first `rest` of them may be there.
template <int N>
struct ColumnThread {
  int64_t column, first_row, step, whole_rows;
  int tx, ty;
  bool active;

  __device__ __forceinline__ explicit ColumnThread(const ColumnsLaunch& c)
      : tx(threadIdx.x % c.tx), ty(threadIdx.x / c.tx) {
    column = (static_cast<int64_t>(blockIdx.x) * c.tx + tx) * N;
    first_row = static_cast<int64_t>(blockIdx.y) * c.ty + ty;
    step = static_cast<int64_t>(gridDim.y) * c.ty;
    whole_rows = c.rows.of(first_row) + (in_tail(c) >= N);
    active = ty < c.ty && column < c.columns.width;
  }

  // How many columns the partial last row has from this thread's first on, perhaps below 0; 0 if the row is not its
  // own.
  __device__ __forceinline__ int64_t in_tail(const ColumnsLaunch& c) const {
    return first_row == c.rows.over ? c.columns.tail - column : 0;
  }
  __device__ __forceinline__ int rest(const ColumnsLaunch& c) const {
    const int64_t n = in_tail(c);
    return n > 0 && n < N ? static_cast<int>(n) : 0;
  }
};

// The parameters of a thread's N columns, where they are not contiguous. Each of the threads that have the same columns
// loads some of them into shared memory, [q][column of N][tx]; after a barrier, each takes them all.
template <class P, int N, class A>
__device__ __forceinline__ void share_parameters(const ColumnsLaunch& c, const ColumnThread<N>& t,
                                                 const ParameterArgs& a, ParameterIndex index) {
  A* const shared = reinterpret_cast<A*>(leaf_smem);
  int64_t within = t.column % c.inner;
  int own = t.ty;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (e == own) {
      Parameters<A> p;
      load_parameters<P, 1, 1>(a, index, &p);
      const A values[] = {p.p1, p.p2, p.p3, p.p4};
#pragma unroll
      for (int q = 0; q < 4; ++q) shared[(q * N + e) * c.tx + t.tx] = values[q];
      own += c.ty;
    }
    if (++within == c.inner) {
      within = 0;
      a.matrix.advance(index);
    }
  }
}
template <int N, class A>
__device__ __forceinline__ void take_parameters(const ColumnsLaunch& c, const ColumnThread<N>& t, Parameters<A>* p) {
  const A* const shared = reinterpret_cast<const A*>(leaf_smem);
  __syncthreads();
  if (t.active) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const auto value = [&](int q) { return shared[(q * N + e) * c.tx + t.tx]; };
      p[e] = {value(0), value(1), value(2), value(3)};
    }
  }
  __syncthreads();  // before sums are written there
}

// Adds up the sums of a tile's parameters over the block's rows, the periods in the tile and `inner`, and stores them.
// All threads must call it.
template <int sums, class S, int N>
__device__ __forceinline__ void store_sums_of_columns(const ColumnsLaunch& c, const ColumnThread<N>& t,
                                                      const Arithmetic<S>* sum, const SumTarget<sums, S>& target) {
  using A = Arithmetic<S>;
  constexpr int Run = N < 16 / static_cast<int>(sizeof(A)) ? N : 16 / sizeof(A);
  A* const shared = reinterpret_cast<A*>(leaf_smem);  // [q][ty][column] = [q][term][column of a period]
  // Where a thread has two 16-byte words, four of eight threads store the second first: together they use all banks.
  const bool backwards = N == 2 * Run && t.tx / 4 % 2;
  if (t.ty < c.ty) {
#pragma unroll
    for (int q = 0; q < sums; ++q)
#pragma unroll
      for (int run = 0; run < N; run += Run) {
        const int other = N - Run - run;
        Vector<A, Run> v;
#pragma unroll
        for (int e = 0; e < Run; ++e) v.at[e] = backwards ? sum[(other + e) * sums + q] : sum[(run + e) * sums + q];
        A* const own = shared + ((q * c.ty + t.ty) * c.tx + t.tx) * N;
        *reinterpret_cast<Word<A, Run>*>(own + (backwards ? other : run)) = word_of(v);
      }
  }
  __syncthreads();
  const int inner = static_cast<int>(c.inner), terms = c.ty * c.tile_folds;
  const int shares = c.term_shares * c.inner_shares;
  const int lane = threadIdx.x % kWarp, share = threadIdx.x % shares;
  // Where `inner` has factors of two, a warp's sums begin at different columns: else there would be bank conflicts.
  const int banks = min(inner & -inner, kWarp), begin = lane / shares * banks / kWarp * c.inner_shares;
  for (int first = threadIdx.x - lane; first < sums * c.results * shares; first += blockDim.x) {
    const int result = (first + lane) / shares, q = result / c.results, of_q = result % c.results;
    A total = 0;
    for (int term = share / c.inner_shares; q < sums && term < terms; term += c.term_shares) {
      const A* const from = shared + ((q * terms + term) * c.results + of_q) * inner;
      for (int n = share % c.inner_shares; n < inner; n += c.inner_shares) {
        const int i = n + begin;
        total += from[i < inner ? i : i - inner];
      }
    }
    for (int other = shares / 2; other > 0; other /= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
    const int64_t slot = static_cast<int64_t>(blockIdx.x) * c.results + of_q;
    if (share || q >= sums || slot >= c.slots) continue;
    target.store(q, blockIdx.y * c.period_parts * c.count + slot, total);
  }
}

template <class Op, class S, int N, int Unroll>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<Op, S, N, false>)
    columns(ColumnsLaunch c, ParameterArgs parameters, Operands<Op, S> a,
            const __grid_constant__ SumTarget<Op::sums, S> target) {
  using A = Arithmetic<S>;
  const ColumnThread<N> t(c);
  const bool share = N > 1 && !c.parameter_vectors;
  Parameters<A> p[N * Op::sets];
  if (t.active) {
    const ParameterIndex index = parameters.matrix.at(t.column / c.inner % c.count);
    with_type<S>(parameters.dtype, [&](auto zero) {
      using P = decltype(zero);
      if (share)
        share_parameters<P, N, A>(c, t, parameters, index);
      else
        load_parameters<P, Op::sets, N>(parameters, index, p);
    });
  }
  if (share) take_parameters<N>(c, t, p);
  A sum[N * kSums<Op>] = {};
  if (t.active) {
    // Where a row is, at this thread's columns: for pitched operations in lines, one or more per row, else in elements.
    const int64_t per_row = Op::pitched ? c.columns.width / c.line : c.columns.stride;
    const int64_t first = Op::pitched ? t.column / c.line : t.column, in_line = Op::pitched ? t.column % c.line : 0;
    const auto at = [&](int64_t row) { return row * per_row + first; };
    const auto place = [&](int64_t row_at) ->
        typename Operands<Op, S>::Place { return {row_at, Op::pitched ? in_line : row_at}; };
    const auto repeated = a.template load_repeated<N>();
    const int64_t step = t.step * per_row;
    int64_t row = at(t.first_row);
    for_each_step<Unroll>(t.whole_rows, [&](const auto& is_there) {
      typename Operands<Op, S>::template Loaded<N> loaded[Unroll];
#pragma unroll
      for (int j = 0; j < Unroll; ++j)
        if (is_there(j)) loaded[j] = a.load(place(row + j * step), repeated);
#pragma unroll
      for (int j = 0; j < Unroll; ++j)
        if (is_there(j)) a.template run<true, false>(place(row + j * step), loaded[j], p, sum);
      row += Unroll * step;
    });
    if (const int rest = N > 1 ? t.rest(c) : 0) {
      const auto of_rest = place(at(c.columns.rows));
      a.template run<true, true>(of_rest, a.load_part(of_rest, rest, repeated), p, sum, rest - N);
    }
  }
  if constexpr (Op::sums > 0)
    if (target.wanted) store_sums_of_columns<Op::sums, S, N>(c, t, sum, target);
}

// ---- partial sums to gradients --------------------------------------------------------------------------------------

// Blocks with blockIdx.y = q add up the partial sums of gradient q, in double: few threads add many terms each.
template <int sums, class S>
__global__ void __launch_bounds__(kMaxThreads)
    finish(FinishLaunch f, const __grid_constant__ SumTarget<sums, S> target) {
  constexpr int Unroll = 8;
  double* const shared = reinterpret_cast<double*>(leaf_smem);  // [ky][kx]
  const int x = threadIdx.x % f.kx, y = threadIdx.x / f.kx;
  const int64_t count = f.sums.count, parts = f.sums.parts, q = blockIdx.y;
  if (!target.dp[q]) return;
  for (int64_t k0 = static_cast<int64_t>(blockIdx.x) * f.kx; k0 < count; k0 += static_cast<int64_t>(gridDim.x) * f.kx) {
    double sum[Unroll] = {};
    if (k0 + x < count) {
      const Arithmetic<S>* from = target.partial + (q * parts + y) * count + k0 + x;
      const int64_t step = f.ky * count;
      for (int64_t part = y; part < parts; part += Unroll * f.ky, from += Unroll * step) {
        Arithmetic<S> value[Unroll];  // all are loaded before one is added
#pragma unroll
        for (int j = 0; j < Unroll; ++j) value[j] = part + j * f.ky < parts ? from[j * step] : 0;
#pragma unroll
        for (int j = 0; j < Unroll; ++j) sum[j] += value[j];
      }
    }
#pragma unroll
    for (int half = Unroll / 2; half > 0; half /= 2)
#pragma unroll
      for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
    shared[threadIdx.x] = sum[0];
    for (int half = f.ky / 2; half > 0; half /= 2) {
      __syncthreads();
      if (y < half) shared[threadIdx.x] += shared[threadIdx.x + half * f.kx];
    }
    if (y == 0 && k0 + x < count) target.store_gradient(q, k0 + x, static_cast<Arithmetic<S>>(shared[threadIdx.x]));
    __syncthreads();  // before the next round writes
  }
}

}  // namespace cuda
}  // namespace leaf_cuda
