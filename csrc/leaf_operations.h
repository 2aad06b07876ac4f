// The operations: what a pass over u does with one element, for the loops of every backend.
//
// An operation has `inputs` and `outputs` of u's shape, in[0] is u; `sets` of parameters, four each; and, with `sums`,
// adds the element's share of the gradients of the first set's parameters to sum[0..3]. Of a `pitched` one each operand
// may have a distance of its own from row to row (Args::run).
#pragma once

#include "leaf_math.h"

namespace leaf_cuda {

enum class Operation { forward, backward, double_backward, glu_forward, glu_backward };

// The most of any operation.
constexpr int kMaxInputs = 3, kMaxOutputs = 2, kMaxParameters = 8;

// (u) → y
struct Forward {
  static constexpr Operation operation = Operation::forward;
  static constexpr int inputs = 1, outputs = 1, sets = 1;
  static constexpr bool sums = false, pitched = false;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const T* in, const Parameters<T>* p, T* out, T*) {
    out[0] = leaf<M>(in[0], p[0]);
  }
};

// (u, grad) → du, Σ dp1, ..., Σ dp4
struct Backward {
  static constexpr Operation operation = Operation::backward;
  static constexpr int inputs = 2, outputs = 1, sets = 1;
  static constexpr bool sums = true, pitched = false;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const T* in, const Parameters<T>* p, T* out, T* sum) {
    const Partials<T> d = leaf_partials<M>(in[0], in[1], p[0]);
    out[0] = d.u;
    sum[0] += d.p1;
    sum[1] += d.p2;
    sum[2] += d.p3;
    sum[3] += in[1];
  }
};

// (u, grad, v) and a second set of parameters, v1, ..., v4 → dgrad, du, Σ dp1, Σ dp2, Σ dp3. The gradient of p4 is 0.
struct DoubleBackward {
  static constexpr Operation operation = Operation::double_backward;
  static constexpr int inputs = 3, outputs = 2, sets = 2;
  static constexpr bool sums = true, pitched = false;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const T* in, const Parameters<T>* p, T* out, T* sum) {
    const Along<T> d = leaf_along<M>(in[0], in[1], p[0], in[2], p[1]);
    out[0] = d.value;
    out[1] = d.partials.u;
    sum[0] += d.partials.p1;
    sum[1] += d.partials.p2;
    sum[2] += d.partials.p3;
  }
};

// The gated unit y = leaf(u)·b: (u, b) → y
struct GluForward {
  static constexpr Operation operation = Operation::glu_forward;
  static constexpr int inputs = 2, outputs = 1, sets = 1;
  static constexpr bool sums = false, pitched = true;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const T* in, const Parameters<T>* p, T* out, T*) {
    out[0] = leaf<M>(in[0], p[0]) * in[1];
  }
};

// (u, b, grad) → du, db, Σ dp1, ..., Σ dp4. (The two calls have their σ in common: compilers see it.)
struct GluBackward {
  static constexpr Operation operation = Operation::glu_backward;
  static constexpr int inputs = 3, outputs = 2, sets = 1;
  static constexpr bool sums = true, pitched = true;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const T* in, const Parameters<T>* p, T* out, T* sum) {
    const T grad = in[2] * in[1];
    const Partials<T> d = leaf_partials<M>(in[0], grad, p[0]);
    out[0] = d.u;
    out[1] = in[2] * leaf<M>(in[0], p[0]);
    sum[0] += d.p1;
    sum[1] += d.p2;
    sum[2] += d.p3;
    sum[3] += grad;
  }
};

}  // namespace leaf_cuda
