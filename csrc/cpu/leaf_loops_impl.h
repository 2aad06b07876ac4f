// The loops of leaf_loops.h for one instruction set. The leaf_loops_*.cpp that includes this file defines
// LEAF_VECTOR_BYTES and LEAF_LOOPS_TABLE. simd.h says what may be included and defined here.
#pragma once

#include <type_traits>

#include "leaf_loops.h"
#include "simd.h"

namespace {

using leaf_cuda::Argument;
using leaf_cuda::kSums;
using leaf_cuda::Parameters;
using leaf_cuda::cpu::kColumnMultiple;
using leaf_cuda::cpu::kSumStride;
using leaf_cuda::cpu::kVectorBytes;
using leaf_cuda::cpu::Segment;

// The arithmetic on elements stored as S, and the type of its numbers.
template <class S>
using Math = std::conditional_t<std::is_floating_point_v<S>, Simd<S>, Simd<float, ApproximateExpConstants>>;
template <class S>
using Arithmetic = typename Math<S>::Number;

// Copies n elements, fewer than a vector has, in pieces of a power of two: a memcpy of variable length would be a call,
// across which no vector stays in its register.
template <class S>
LEAF_FUNCTION void copy_n(S* to, const S* from, int64_t n) {
#pragma GCC unroll 8
  for (int size = Math<S>::lanes / 2; size > 0; size /= 2)
    if (n & size) {
      memcpy(to, from, size * sizeof(S));
      to += size, from += size;
    }
}
// Loads n < lanes elements; the other lanes are zero.
template <class S>
inline auto load_n(const S* p, int64_t n) {
  S padded[Math<S>::lanes] = {};
#if LEAF_VECTOR_BYTES == 64
  masked_load<sizeof(padded)>(padded, p, (uint64_t{1} << n * sizeof(S)) - 1);
#else
  copy_n(padded, p, n);
#endif
  return load(padded);
}
template <class S, class V>
inline void store_n(S* p, V v, int64_t n) {
  S padded[Math<S>::lanes];
  store(padded, v);
  copy_n(p, padded, n);
}

// Prefetches the cache line of p[i], which may lie beyond the end, to the second-level cache. (To the first-level cache
// it was slower, most of all for short rows: docs/performance.md.)
template <class S>
inline void prefetch(const S* p, int64_t i) {
  __builtin_prefetch(p + i, 0, 2);
}
// The least distance of prefetches, in bytes of each operand. The hardware prefetcher does not cross a page of memory.
constexpr int64_t kAhead = 4096;

// leaf_loops.h's Operands for an operation and a storage type. Bit k of `Repeated` is set if input k is a single
// element: in[k] then points to a vector of copies of it. With `Streamed`, outputs are written by streaming stores, for
// which each of their vectors must be aligned.
template <class Op_, class S_, unsigned Repeated, bool Streamed>
struct Operands {
  using Op = Op_;
  using S = S_;
  using T = Arithmetic<S>;
  using M = Math<S>;
  using V = typename M::V;

  const S* in[Op::inputs];
  S* out[Op::outputs];
  int64_t in_row[Op::inputs], out_row[Op::outputs];  // of pitched operations

  static constexpr bool is_repeated(int k) { return Repeated >> k & 1; }
  // Only an operation with sums may lack an output: it may run for the sums alone.
  bool wants(int k) const { return !Op::sums || out[k]; }

  V load(int k, int64_t i) const { return ::load(is_repeated(k) ? in[k] : in[k] + i); }
  V load_n(int k, int64_t i, int64_t n) const { return is_repeated(k) ? ::load(in[k]) : ::load_n(in[k] + i, n); }
  void store(int k, int64_t i, V v) const {
    if constexpr (Streamed)
      stream(out[k] + i, v);
    else
      ::store(out[k] + i, v);
  }
  void store_n(int k, int64_t i, V v, int64_t n) const { ::store_n(out[k] + i, v, n); }

  // Number of elements from row to row of a block of columns.
  int64_t in_stride(int k, int64_t stride) const { return Op::pitched ? in_row[k] : stride; }
  int64_t out_stride(int k, int64_t stride) const { return Op::pitched ? out_row[k] : stride; }

  // The operands `row` rows further on, at the same column.
  Operands at_row(int64_t row, int64_t stride) const {
    Operands a = *this;
#pragma GCC unroll 8
    for (int k = 0; k < Op::inputs; ++k)
      if (!is_repeated(k)) a.in[k] += row * in_stride(k, stride);
#pragma GCC unroll 8
    for (int k = 0; k < Op::outputs; ++k)
      if (wants(k)) a.out[k] += row * out_stride(k, stride);
    return a;
  }

  void prefetch_in(int k, int64_t i) const {
    if (!is_repeated(k)) ::prefetch(in[k], i);
  }
  void prefetch_out(int k, int64_t i) const {
    if (!Streamed) ::prefetch(out[k], i);
  }
};

// Number of terms in a sum, at most: kTerms vectors (or rows) are summed, kTerms of these sums are added up, and the
// results are added in double. This is as exact as eager PyTorch's sums, which take sixteen terms at every level.
constexpr int64_t kTerms = 16;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

using Doubles = Simd<double>::V;
inline Doubles in_double(Doubles v) { return v; }
// The vector's two halves, converted to double and added lane by lane.
inline Doubles in_double(Simd<float>::V v) {
#if LEAF_VECTOR_BYTES == 64  // GCC 12 compiles the generic conversion to three times as many instructions
  const auto low = _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0);
  const auto high = _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1);
  return (Doubles)_mm512_maskz_cvtps_pd(0xff, low) + (Doubles)_mm512_maskz_cvtps_pd(0xff, high);
#else
  typedef float Half __attribute__((vector_size(LEAF_VECTOR_BYTES / 2)));
  Half halves[2];
  memcpy(halves, &v, sizeof(v));
  return __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
#endif
}

template <int bytes>
struct DoublesOf {
  typedef double V __attribute__((vector_size(bytes)));
};
// Adds up the lanes by halves: left to itself, GCC 12 adds element by element.
template <int bytes>
inline double sum_of_lanes(typename DoublesOf<bytes>::V v) {
  if constexpr (bytes == 2 * sizeof(double)) {
    return v[0] + v[1];
  } else {
    typename DoublesOf<bytes / 2>::V halves[2];
    memcpy(halves, &v, sizeof(v));
    return sum_of_lanes<bytes / 2>(halves[0] + halves[1]);
  }
}

// Vectors that share their parameters are computed in groups, in two steps: `start` computes e^(−|z|) of an operation's
// arguments (leaf_operations.h), `finish` all else, also the e^(−|z|) of what it computes itself, such as LSTM's c'.
// Between the two steps of a group comes the first step of the next one. So the chain of operations that depend on one
// another is cut in two, and the processor, which holds only so many that wait, finds more that are ready
// (docs/performance.md).
//
// A group has Rows vectors or, where Rows is 0, n: from element `at` of each operand on, in rows that are `stride`
// elements (in pitched operations in_row and out_row) apart. What `later` has there is prefetched.
constexpr int kGroup = 4;

// e^(−|z|) of a group's arguments.
template <class O>
using Exponentials = typename O::V[kGroup][O::Op::arguments];

// Calls f(r) for each vector of a group.
template <int Rows, class F>
LEAF_FUNCTION void for_each_vector(int64_t n, const F& f) {
  if constexpr (Rows > 0) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < Rows; ++r) f(r);
  } else {
#pragma GCC unroll 1
    for (int64_t r = 0; r < n; ++r) f(r);
  }
}

template <int Rows, class O>
LEAF_FUNCTION void start(const O& a, int64_t at, int64_t stride, int64_t n, const O& later,
                         const Parameters<typename O::V>* p, Exponentials<O>& e) {
  using Op = typename O::Op;
  for_each_vector<Rows>(n, [&](int64_t r) {
    typename O::V in[Op::arguments];
    Argument<typename O::V> x[Op::arguments];
#pragma GCC unroll 8
    for (int k = 0; k < Op::arguments; ++k) {
      const int64_t row = a.in_stride(k, stride);
      in[k] = a.load(k, r * row + at);
      later.prefetch_in(k, r * row + at);
    }
    leaf_cuda::take_arguments<Op, typename O::M>(in, p, x);
#pragma GCC unroll 8
    for (int k = 0; k < Op::arguments; ++k) e[r][k] = x[k].e;
  });
}

// Adds to sum[q].
template <int Rows, class O>
LEAF_FUNCTION void finish(const O& a, int64_t at, int64_t stride, int64_t n, const O& later,
                          const Parameters<typename O::V>* p, const Exponentials<O>& e, typename O::V* sum) {
  using Op = typename O::Op;
  using M = typename O::M;
  typename O::V out[kGroup][Op::outputs];
  const auto store = [&](int64_t r, const typename O::V* results) {
#pragma GCC unroll 8
    for (int k = 0; k < Op::outputs; ++k) {
      if (!a.wants(k)) continue;
      const int64_t row = a.out_stride(k, stride);
      a.store(k, r * row + at, results[k]);
      later.prefetch_out(k, r * row + at);
    }
  };
  for_each_vector<Rows>(n, [&](int64_t r) {
    typename O::V in[Op::inputs];
    Argument<typename O::V> x[Op::arguments];
#pragma GCC unroll 8
    for (int k = 0; k < Op::inputs; ++k) {
      const int64_t row = a.in_stride(k, stride);
      in[k] = a.load(k, r * row + at);
      if (k >= Op::arguments) later.prefetch_in(k, r * row + at);
    }
#pragma GCC unroll 8
    for (int k = 0; k < Op::arguments; ++k) x[k] = {in[k], M::with_sign_of_product(p[k].p3, in[k]), e[r][k]};
    Op::template apply<M>(x, in, p, out[Rows ? r : 0], sum);
    if (!Rows) store(r, out[0]);
  });
  // Stored last: the compiler may not move a load before a store.
  if (Rows) for_each_vector<Rows>(n, [&](int64_t r) { store(r, out[r]); });
}

// Computes `count` groups by start(g, e) and finish(g, e).
template <int Rows, class O, class Start, class Finish>
LEAF_FUNCTION void groups(int64_t count, const Start& start, const Finish& finish) {
  Exponentials<O> e, next = {};
  if (count > 0) start(0, next);
  for (int64_t g = 0; g < count; ++g) {
#pragma GCC unroll 8
    for (int r = 0; r < (Rows ? Rows : kGroup); ++r)
#pragma GCC unroll 8
      for (int k = 0; k < O::Op::arguments; ++k) e[r][k] = next[r][k];
    if (g + 1 < count) start(g + 1, next);
    finish(g, e);
  }
}

// Computes n rows of fewer elements than a vector has; adds to sum[q], whose other lanes become meaningless. (GCC 12 on
// its own would make the lambda a call, and keep in memory what it captures, in all that surrounds it.)
template <class O>
LEAF_FUNCTION void partial_vectors(const O& a, int64_t at, int64_t stride, int64_t n, int64_t elements,
                                   const Parameters<typename O::V>* p, typename O::V* sum) {
  using Op = typename O::Op;
  for_each_vector<0>(n, [&](int64_t r) __attribute__((always_inline)) {
    typename O::V in[Op::inputs], out[Op::outputs];
#pragma GCC unroll 8
    for (int k = 0; k < Op::inputs; ++k) in[k] = a.load_n(k, r * a.in_stride(k, stride) + at, elements);
    leaf_cuda::apply<Op, typename O::M>(in, p, out, sum);
#pragma GCC unroll 8
    for (int k = 0; k < Op::outputs; ++k)
      if (a.wants(k)) a.store_n(k, r * a.out_stride(k, stride) + at, out[k], elements);
  });
}

// Computes the elements from begin to end, whole vectors that share their parameters; adds their sums to total[q],
// those of kTerms vectors at a time.
template <class O>
LEAF_FUNCTION void vectors(const O& a, int64_t begin, int64_t end, const Parameters<typename O::V>* p,
                           typename O::V* total) {
  using Op = typename O::Op;
  using V = typename O::V;
  constexpr int64_t lanes = O::M::lanes, step = kGroup * lanes;
  const O later = a.at_row(kAhead / sizeof(typename O::S) / lanes, lanes);
  static_assert(kTerms % kGroup == 0);
  V sum[kSums<Op>] = {};
  const auto add_sums = [&] {
    for (int q = 0; q < Op::sums; ++q) {
      total[q] += sum[q];
      sum[q] = V{};
    }
  };
  const int64_t count = (end - begin) / step;
  groups<kGroup, O>(
      count, [&](int64_t g, Exponentials<O>& e) { start<kGroup>(a, begin + g * step, lanes, kGroup, later, p, e); },
      [&](int64_t g, const Exponentials<O>& e) {
        finish<kGroup>(a, begin + g * step, lanes, kGroup, later, p, e, sum);
        if ((g + 1) % (kTerms / kGroup) == 0) add_sums();
      });
  const int64_t rest = begin + count * step, n = (end - rest) / lanes;
  Exponentials<O> e = {};
  start<0>(a, rest, lanes, n, later, p, e);
  finish<0>(a, rest, lanes, n, later, p, e, sum);
  add_sums();
}

// v with only its first n < lanes lanes; the others become 0, whatever they hold.
template <class M>
LEAF_FUNCTION typename M::V first_lanes(typename M::V v, int n) {
  typename M::I lane;
  for (int k = 0; k < M::lanes; ++k) lane[k] = k;
  return lane < n ? v : typename M::V{};
}

// Computes segments in pieces, each of at most as many terms as may be summed in the arithmetic type. The lanes of up
// to kPieces pieces are added up together, later: these additions wait for a piece's last element, and right after it
// they would delay the next piece.
template <class O>
void segments(O a, const Segment* segment, int64_t count, const double* p_, double* sums) {
  using Op = typename O::Op;
  using M = typename O::M;
  using V = typename O::V;
  constexpr int kPieces = 16;
  if (Op::pitched) {  // to `start` and `finish`, a segment's rows are vectors side by side
    for (int k = 0; k < Op::inputs; ++k) a.in_row[k] = M::lanes;
    for (int k = 0; k < Op::outputs; ++k) a.out_row[k] = M::lanes;
  }
  V lanes[kPieces][kSums<Op>];
  int64_t of[kPieces];
  int pieces = 0;
  const auto add_up = [&] {
    for (int k = 0; k < pieces; ++k)
      for (int q = 0; q < Op::sums; ++q)
        sums[Op::sums * of[k] + q] += sum_of_lanes<LEAF_VECTOR_BYTES>(in_double(lanes[k][q]));
    pieces = 0;
  };
  for (int64_t k = 0; k < Op::sums * count; ++k) sums[k] = 0;
  for (int64_t k = 0; k < count; ++k) {
    Parameters<V> p[Op::sets];
#pragma GCC unroll 8
    for (int set = 0; set < Op::sets; ++set, p_ += 4)
      p[set] = {M::broadcast(p_[0]), M::broadcast(p_[1]), M::broadcast(p_[2]), M::broadcast(p_[3])};
    for (int64_t i = segment[k].begin, end = segment[k].end; i < end;) {
      const int64_t whole = i + (end - i) / M::lanes * M::lanes;
      const int64_t last = Op::sums ? least(whole, i + kTerms * kTerms * M::lanes) : whole;
      V total[kSums<Op>] = {};
      vectors(a, i, last, p, total);
      i = last;
      if (whole == last && whole < end) {
        const int rest = static_cast<int>(end - i);
        V sum[kSums<Op>] = {};
        partial_vectors(a, i, M::lanes, 1, rest, p, sum);
        for (int q = 0; q < Op::sums; ++q) total[q] += first_lanes<M>(sum[q], rest);
        i = end;
      }
      if (!Op::sums) continue;
      for (int q = 0; q < Op::sums; ++q) lanes[pieces][q] = total[q];
      of[pieces] = k;
      if (++pieces == kPieces) add_up();
    }
  }
  add_up();
}

template <class T, int Sets>
struct ColumnParameters {
  const T* p[4 * Sets];

  explicit ColumnParameters(const void* const* from) {
    for (int q = 0; q < 4 * Sets; ++q) p[q] = static_cast<const T*>(from[q]);
  }
  void load_at(int64_t c, Parameters<typename Simd<T>::V>* to) const {
#pragma GCC unroll 8
    for (int set = 0; set < Sets; ++set)
      to[set] = {load(p[4 * set] + c), load(p[4 * set + 1] + c), load(p[4 * set + 2] + c), load(p[4 * set + 3] + c)};
  }
};

// A block of columns (leaf_loops.h).
template <class O>
struct Block {
  O operands;
  int64_t rows, stride, columns;
  ColumnParameters<typename O::T, O::Op::sets> parameters;
};

// Where a tile's sums come from and go to, in arrays indexed by q·kSumStride<Op> + c: the first of the tiles that make
// up kTerms rows starts at 0, the last one adds their sums to the total.
template <class T>
struct TileSums {
  T *part, *total;
  bool first, last;
};

// Computes a tile, n rows of a block from the operands' first on, by groups of one vector of each row: so a column's
// parameters and sums pass through registers once per tile. What `later` has there is prefetched: the hardware
// prefetcher follows one long run, not several short ones.
template <int Rows, class O>
LEAF_FUNCTION void tile(const O& a, const Block<O>& b, int64_t n, const O& later, const TileSums<typename O::T>& sums) {
  using Op = typename O::Op;
  using V = typename O::V;
  constexpr int64_t lanes = O::M::lanes;
  Parameters<V> p[Op::sets];
  // Calls f(sum) for the vector of columns from c on.
  const auto with_sums = [&](int64_t c, const auto& f) {
    V sum[kSums<Op>] = {};
    if (Op::sums && !sums.first)
#pragma GCC unroll 32
      for (int q = 0; q < Op::sums; ++q) sum[q] = load(sums.part + q * kSumStride<Op> + c);
    f(sum);
    if (!Op::sums) return;
    if (sums.last)
#pragma GCC unroll 32
      for (int q = 0; q < Op::sums; ++q) sum[q] += load(sums.total + q * kSumStride<Op> + c);
    typename O::T* const to = (sums.last ? sums.total : sums.part) + c;
#pragma GCC unroll 32
    for (int q = 0; q < Op::sums; ++q) store(to + q * kSumStride<Op>, sum[q]);
  };
  const int64_t whole = b.columns / lanes * lanes;
  groups<Rows, O>(
      whole / lanes,
      [&](int64_t g, Exponentials<O>& e) {
        b.parameters.load_at(g * lanes, p);
        start<Rows>(a, g * lanes, b.stride, n, later, p, e);
      },
      [&](int64_t g, const Exponentials<O>& e) {
        b.parameters.load_at(g * lanes, p);
        with_sums(g * lanes, [&](V* sum) { finish<Rows>(a, g * lanes, b.stride, n, later, p, e, sum); });
      });
  if (whole == b.columns) return;
  b.parameters.load_at(whole, p);
  with_sums(whole, [&](V* sum) { partial_vectors(a, whole, b.stride, n, b.columns - whole, p, sum); });
}

// Computes the rows from `first` to `end` of the block and adds their sums, kTerms rows at a time, to total. (Not
// inlined: in one function with the sums in double, GCC 12 runs out of registers. b is passed by value, so that no
// store can change it.)
template <class O>
__attribute__((noinline)) void rows(Block<O> b, int64_t first, int64_t end, typename O::T* part, typename O::T* total) {
  const int64_t tile_bytes = kGroup * b.columns * sizeof(typename O::S);
  const int64_t ahead = (kAhead + tile_bytes - 1) / tile_bytes * kGroup;
  for (int64_t r = first; r < end;) {
    const int64_t begin = r, last = O::Op::sums ? r + least(end - r, kTerms) : end;
    while (r < last) {
      // If four rows of several sets were unrolled, they would take more registers than there are.
      constexpr int unrolled = O::Op::sets == 1 ? kGroup : 0;
      const int64_t n = r + kGroup <= last ? kGroup : unrolled ? 1 : last - r;
      const O a = b.operands.at_row(r, b.stride), later = a.at_row(r + ahead + n <= b.rows ? ahead : 0, b.stride);
      const TileSums<typename O::T> sums{part, total, r == begin, r + n == last};
      if (n == 1)
        tile<1>(a, b, n, later, sums);
      else
        tile<unrolled>(a, b, n, later, sums);
      r += n;
    }
  }
}

template <class O>
void columns(const Block<O>& b, typename O::T* sums) {
  using Op = typename O::Op;
  using T = typename O::T;
  constexpr int64_t most = Op::sums ? kTerms * kTerms : INT64_MAX;
  const int64_t padded = (b.columns + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple;
  const auto for_each_sum = [&](auto f) {
    for (int q = 0; q < Op::sums; ++q)
      for (int64_t c = 0; c < padded; ++c) f(q * kSumStride<Op> + c);
  };
  alignas(kVectorBytes) T part[kSums<Op> * kSumStride<Op>];
  alignas(kVectorBytes) double total[kSums<Op> * kSumStride<Op>];
  for_each_sum([&](int64_t k) { sums[k] = 0; });
  if (b.rows <= most) return rows(b, 0, b.rows, part, sums);
  for_each_sum([&](int64_t k) { total[k] = 0; });
  for (int64_t r = 0; r < b.rows; r += most) {
    rows(b, r, r + least(b.rows - r, most), part, sums);
    for_each_sum([&](int64_t k) {
      total[k] += sums[k];
      sums[k] = 0;
    });
  }
  for_each_sum([&](int64_t k) { sums[k] = static_cast<T>(total[k]); });
}

template <class Op, class S>
struct Typed {
  using Given = leaf_cuda::cpu::Operands;
  static constexpr int lanes = Math<S>::lanes;
  // Streaming stores pay if they leave the processor as whole cache lines. Two consecutive halves of a line in a
  // segment do; those of a tile do not, since it begins the lines of all its rows before one is full
  // (docs/performance.md).
  static constexpr bool may_stream_segments = lanes * sizeof(S) >= kVectorBytes / 2;
  static constexpr bool may_stream_columns = lanes * sizeof(S) == kVectorBytes;

  template <unsigned Repeated, bool Streamed, class F>
  static void call(const Given& given, F f) {
    Operands<Op, S, Repeated, Streamed> a;
    S repeated[Op::inputs][lanes];
    for (int k = 0; k < Op::inputs; ++k) {
      a.in[k] = static_cast<const S*>(given.in[k]);
      if (!a.is_repeated(k)) continue;
      for (S& x : repeated[k]) x = *a.in[k];
      a.in[k] = repeated[k];
    }
    for (int k = 0; k < Op::inputs; ++k) a.in_row[k] = given.in_row[k];
    for (int k = 0; k < Op::outputs; ++k) {
      a.out[k] = static_cast<S*>(given.out[k]);
      a.out_row[k] = given.out_row[k];
    }
    f(a);
  }

  // Calls f with Operands of the type that fits; rows are `stride` elements apart. (If an input is repeated, nothing is
  // streamed.)
  template <bool MayStream, unsigned Repeated = 0, class F>
  static void dispatch(const Given& given, int64_t stride, bool stream, F f) {
    unsigned mask = 0;
    for (int k = 1; k < Op::inputs; ++k) mask |= unsigned{given.in_stride[k] == 0} << k & Op::repeatable;
    if constexpr (Repeated < Op::repeatable)
      if (mask != Repeated) return dispatch<MayStream, Repeated + 2>(given, stride, stream, f);
    if constexpr (MayStream && Repeated == 0)
      if (stream && are_aligned(given, stride)) return call<Repeated, true>(given, f);
    call<Repeated, false>(given, f);
  }

  static bool are_aligned(const Given& given, int64_t stride) {
    bool aligned = true;
    for (int k = 0; k < Op::outputs; ++k)
      aligned = aligned && reinterpret_cast<uintptr_t>(given.out[k]) % (lanes * sizeof(S)) == 0 &&
                (Op::pitched ? given.out_row[k] : stride) % lanes == 0;
    return aligned;
  }

  static void run_segments(const Given& given, const Segment* segment, int64_t count, const double* p, bool stream,
                           double* sums) {
    for (int64_t k = 0; k < count; ++k) stream = stream && segment[k].begin % lanes == 0;
    dispatch<may_stream_segments>(given, 0, stream, [&](const auto& a) { segments(a, segment, count, p, sums); });
  }

  static void run_columns(const Given& given, int64_t rows, int64_t stride, int64_t n, const void* const* p,
                          bool stream, void* sums) {
    dispatch<may_stream_columns>(given, stride, stream, [&](const auto& a) {
      using O = std::remove_cvref_t<decltype(a)>;
      columns(Block<O>{a, rows, stride, n, ColumnParameters<typename O::T, Op::sets>(p)},
              static_cast<typename O::T*>(sums));
    });
  }
};

template <class Op, class S>
constexpr leaf_cuda::cpu::InnerLoops loops() {
  if constexpr (Op::always_pitched)
    return {nullptr, Typed<Op, S>::run_columns};
  else
    return {Typed<Op, S>::run_segments, Typed<Op, S>::run_columns};
}

template <class S>
constexpr leaf_cuda::cpu::InnerLoopsByOperation loops_by_operation() {
  leaf_cuda::cpu::InnerLoopsByOperation result{};
  leaf_cuda::Operations::for_each(
      [&](auto op) { result.loops[static_cast<int>(decltype(op)::operation)] = loops<decltype(op), S>(); });
  return result;
}

}  // namespace

namespace leaf_cuda::cpu {
extern const InnerLoopsByType LEAF_LOOPS_TABLE = {loops_by_operation<double>(), loops_by_operation<float>(),
                                                  loops_by_operation<BFloat16>(), loops_by_operation<Half>()};
}
