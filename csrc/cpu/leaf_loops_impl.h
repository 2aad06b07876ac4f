// The loops of leaf_loops.h for one instruction set: LEAF_VECTOR_BYTES and LEAF_LOOPS_TABLE come from the including
// leaf_loops_*.cpp. See simd.h for what may stand here.
#pragma once

#include "leaf_loops.h"
#include "simd.h"

namespace {

using leaf_cuda::leaf;
using leaf_cuda::leaf_partials;
using leaf_cuda::Parameters;
using leaf_cuda::Partials;
using leaf_cuda::cpu::kColumnMultiple;
using leaf_cuda::cpu::kSumStride;

template <class S>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class S>
using Arithmetic = typename ArithmeticOf<S>::type;

// The first n < lanes elements; the other lanes are zero.
template <class S>
inline auto load_n(const S* p, int64_t n) {
  S padded[Simd<Arithmetic<S>>::lanes] = {};
  memcpy(padded, p, n * sizeof(S));
  return load(padded);
}
template <class S, class V>
inline void store_n(S* p, V v, int64_t n) {
  S padded[Simd<Arithmetic<S>>::lanes];
  store(padded, v);
  memcpy(p, padded, n * sizeof(S));
}

// To the second-level cache.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_to_write(void* p) { __builtin_prefetch(p, 1, 2); }

// Where y goes: through the caches or, if asked and if every vector of it is aligned, past them.
template <class S>
struct Destination {
  bool streamed;

  Destination(bool stream_y, const S* y, int64_t stride)
      : streamed(stream_y && reinterpret_cast<uintptr_t>(y) % kBytes == 0 && stride * sizeof(S) % kBytes == 0) {}
  template <class V>
  void store(S* p, V v) const {
    if (streamed)
      stream(p, v);
    else
      ::store(p, v);
  }
  void prefetch(S* p) const {
    if (!streamed) prefetch_to_write(p);
  }
  void end() const {
    if (streamed) end_of_stream();
  }

 private:
  static constexpr size_t kBytes = Simd<Arithmetic<S>>::lanes * sizeof(S);
};

// A float sum runs over this many vectors (or rows) at most before it is added to a double: eager PyTorch's sums of a
// few hundred numbers are as exact.
constexpr int64_t kFlush = 16;

template <class S>
void forward_segment(const void* u_, void* y_, int64_t n, const double* p_, bool stream_y) {
  using M = Simd<Arithmetic<S>>;
  const S* u = static_cast<const S*>(u_);
  S* y = static_cast<S*>(y_);
  const Parameters<typename M::V> p = {M::broadcast(p_[0]), M::broadcast(p_[1]), M::broadcast(p_[2]),
                                       M::broadcast(p_[3])};
  const Destination<S> destination(stream_y, y, 0);
  int64_t i = 0;
  for (; i + M::lanes <= n; i += M::lanes) destination.store(y + i, leaf<M>(load(u + i), p));
  if (i < n) store_n(y + i, leaf<M>(load_n(u + i, n - i), p), n - i);
  destination.end();
}

template <class S, int GradStride>
void backward_segment(const S* u, const S* grad, S* du, int64_t n, const double* p_, double* sums) {
  using T = Arithmetic<S>;
  using M = Simd<T>;
  using V = typename M::V;
  const Parameters<V> p = {M::broadcast(p_[0]), M::broadcast(p_[1]), M::broadcast(p_[2]), M::broadcast(p_[3])};
  S repeated[M::lanes];
  if (GradStride == 0)
    for (S& x : repeated) x = *grad;
  double lanes[4][M::lanes] = {};
  int64_t i = 0;
  while (i + M::lanes <= n) {
    V a[4] = {};
    const int64_t left = (n - i) / M::lanes;
    const int64_t end = i + (left < kFlush ? left : kFlush) * M::lanes;
    for (; i < end; i += M::lanes) {
      const V g = load(GradStride ? grad + i : repeated);
      const Partials<V> d = leaf_partials<M>(load(u + i), g, p);
      if (du) store(du + i, d.u);
      a[0] += d.p1;
      a[1] += d.p2;
      a[2] += d.p3;
      a[3] += g;
    }
    for (int q = 0; q < 4; ++q)
      for (int k = 0; k < M::lanes; ++k) lanes[q][k] += a[q][k];
  }
  if (i < n) {
    const V g = GradStride ? load_n(grad + i, n - i) : load(repeated);
    const Partials<V> d = leaf_partials<M>(load_n(u + i, n - i), g, p);
    if (du) store_n(du + i, d.u, n - i);
    for (int k = 0; k < n - i; ++k) {
      lanes[0][k] += d.p1[k];
      lanes[1][k] += d.p2[k];
      lanes[2][k] += d.p3[k];
      lanes[3][k] += g[k];
    }
  }
  for (int q = 0; q < 4; ++q)
    for (int k = 0; k < M::lanes; ++k) sums[q] += lanes[q][k];
}

template <class S>
void backward_segment(const void* u, const void* grad, int grad_stride, void* du, int64_t n, const double* p,
                      double* sums) {
  const auto run = grad_stride ? backward_segment<S, 1> : backward_segment<S, 0>;
  run(static_cast<const S*>(u), static_cast<const S*>(grad), static_cast<S*>(du), n, p, sums);
}

template <class T>
struct ColumnParameters {
  const T* p[4];

  explicit ColumnParameters(const void* const* from) {
    for (int q = 0; q < 4; ++q) p[q] = static_cast<const T*>(from[q]);
  }
  Parameters<typename Simd<T>::V> at(int64_t c) const {
    return {load(p[0] + c), load(p[1] + c), load(p[2] + c), load(p[3] + c)};
  }
};

// Rows are taken `kTile` at a time, so that a column's parameters and sums pass through registers once for all of them.
// The next tile's lines are asked for meanwhile, to the second-level cache: the processor foresees one long run, not
// kTile short ones, each in pages of its own.
constexpr int kTile = 4;

template <int n>
struct Tile {
  static constexpr int rows = n;
};

// f(tile of kTile rows or of 1, its first row, elements to the next tile's) for the rows first ... end of a block of
// `rows`.
template <class F>
inline void for_each_tile(int64_t first, int64_t end, int64_t rows, int64_t stride, F f) {
  int64_t r = first;
  for (; r + kTile <= end; r += kTile) f(Tile<kTile>(), r, r + 2 * kTile <= rows ? kTile * stride : 0);
  for (; r < end; ++r) f(Tile<1>(), r, 0);
}

template <class S, int Rows>
void forward_tile(const S* u, S* y, int64_t stride, int64_t ahead, int64_t columns,
                  const ColumnParameters<Arithmetic<S>>& p, Destination<S> destination) {
  using M = Simd<Arithmetic<S>>;
  int64_t c = 0;
  for (; c + M::lanes <= columns; c += M::lanes) {
    const auto pc = p.at(c);
    typename M::V x[Rows];
    for (int r = 0; r < Rows; ++r) x[r] = load(u + r * stride + c);
    for (int r = 0; r < Rows; ++r) {
      prefetch(u + r * stride + c + ahead);
      destination.prefetch(y + r * stride + c + ahead);
    }
    for (int r = 0; r < Rows; ++r) destination.store(y + r * stride + c, leaf<M>(x[r], pc));
  }
  if (c < columns)
    for (int r = 0; r < Rows; ++r) {
      const int64_t i = r * stride + c, n = columns - c;
      store_n(y + i, leaf<M>(load_n(u + i, n), p.at(c)), n);
    }
}

template <class S>
void forward_columns(const void* u_, void* y_, int64_t rows, int64_t stride, int64_t columns, const void* const* p_,
                     bool stream_y) {
  const ColumnParameters<Arithmetic<S>> p(p_);
  const S* u = static_cast<const S*>(u_);
  S* y = static_cast<S*>(y_);
  const Destination<S> destination(stream_y, y, stride);
  for_each_tile(0, rows, rows, stride, [&](auto tile, int64_t r, int64_t ahead) {
    forward_tile<S, decltype(tile)::rows>(u + r * stride, y + r * stride, stride, ahead, columns, p, destination);
  });
  destination.end();
}

template <class S, int GradStride>
struct BackwardBlock {
  const S* u;
  const S* grad;  // with GradStride 0 a vector of one value
  S* du;
  int64_t rows, stride, columns;
  ColumnParameters<Arithmetic<S>> p;
};

// One vector of columns, or its first n if Partial, in each of a tile's rows; `first` is the tile's first element.
template <class S, int GradStride, int Rows, bool Partial>
inline void backward_vector(BackwardBlock<S, GradStride> b, int64_t first, int64_t ahead, int64_t c, int64_t n,
                            Arithmetic<S>* a) {
  using M = Simd<Arithmetic<S>>;
  using V = typename M::V;
  const Parameters<V> p = b.p.at(c);
  V sum[4];
  for (int q = 0; q < 4; ++q) sum[q] = load(a + q * kSumStride + c);
  for (int r = 0; r < Rows; ++r) {
    const int64_t i = first + r * b.stride + c;
    const V u = Partial ? load_n(b.u + i, n) : load(b.u + i);
    const V g = GradStride == 0 ? load(b.grad) : Partial ? load_n(b.grad + i, n) : load(b.grad + i);
    prefetch(b.u + i + ahead);
    if (GradStride) prefetch(b.grad + i + ahead);
    const Partials<V> d = leaf_partials<M>(u, g, p);
    if (b.du) {
      prefetch_to_write(b.du + i + ahead);
      if (Partial)
        store_n(b.du + i, d.u, n);
      else
        store(b.du + i, d.u);
    }
    sum[0] += d.p1;
    sum[1] += d.p2;
    sum[2] += d.p3;
    sum[3] += g;
  }
  for (int q = 0; q < 4; ++q) store(a + q * kSumStride + c, sum[q]);
}

// Rows first ... end; adds to a[q·kSumStride + c].
template <class S, int GradStride>
__attribute__((noinline)) void backward_rows(BackwardBlock<S, GradStride> b, int64_t first, int64_t end,
                                             Arithmetic<S>* a) {
  constexpr int lanes = Simd<Arithmetic<S>>::lanes;
  for_each_tile(first, end, b.rows, b.stride, [&](auto tile, int64_t r, int64_t ahead) {
    constexpr int rows = decltype(tile)::rows;
    int64_t c = 0;
    for (; c + lanes <= b.columns; c += lanes)
      backward_vector<S, GradStride, rows, false>(b, r * b.stride, ahead, c, lanes, a);
    if (c < b.columns) backward_vector<S, GradStride, rows, true>(b, r * b.stride, 0, c, b.columns - c, a);
  });
}

template <class S, int GradStride>
void backward_columns(const BackwardBlock<S, GradStride>& b, Arithmetic<S>* sums) {
  const int64_t rows = b.rows, columns = b.columns;
  const auto clear = [&](auto* a) {
    for (int q = 0; q < 4; ++q)
      memset(a + q * kSumStride, 0, (columns + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple * sizeof(*a));
  };
  clear(sums);
  if (rows <= kFlush) return backward_rows(b, 0, rows, sums);
  double total[4 * kSumStride];
  clear(total);
  for (int64_t r = 0; r < rows; r += kFlush) {
    clear(sums);
    backward_rows(b, r, rows - r < kFlush ? rows : r + kFlush, sums);
    for (int q = 0; q < 4; ++q)
      for (int64_t c = 0; c < columns; ++c) total[q * kSumStride + c] += sums[q * kSumStride + c];
  }
  for (int q = 0; q < 4; ++q)
    for (int64_t c = 0; c < columns; ++c)
      sums[q * kSumStride + c] = static_cast<Arithmetic<S>>(total[q * kSumStride + c]);
}

template <class S>
void backward_columns(const void* u_, const void* grad_, int grad_stride, void* du_, int64_t rows, int64_t stride,
                      int64_t columns, const void* const* p_, void* sums_) {
  const S* u = static_cast<const S*>(u_);
  const S* grad = static_cast<const S*>(grad_);
  S* du = static_cast<S*>(du_);
  const ColumnParameters<Arithmetic<S>> p(p_);
  Arithmetic<S>* sums = static_cast<Arithmetic<S>*>(sums_);
  if (grad_stride) {
    backward_columns(BackwardBlock<S, 1>{u, grad, du, rows, stride, columns, p}, sums);
  } else {
    S repeated[Simd<Arithmetic<S>>::lanes];
    for (S& x : repeated) x = *grad;
    backward_columns(BackwardBlock<S, 0>{u, repeated, du, rows, stride, columns, p}, sums);
  }
}

template <class S>
constexpr leaf_cuda::cpu::InnerLoops loops() {
  return {forward_segment<S>, backward_segment<S>, forward_columns<S>, backward_columns<S>};
}

}  // namespace

namespace leaf_cuda::cpu {
extern const InnerLoopsByType LEAF_LOOPS_TABLE = {loops<double>(), loops<float>(), loops<BFloat16>(), loops<Half>()};
}
