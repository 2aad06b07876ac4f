// The operations: what a pass over u does with one element, for the loops of every backend.
//
// An operation has `inputs` inputs and `outputs` outputs of u's shape, of which in[0] is u, and `sets` sets of four
// parameters. Its first `arguments` inputs are arguments of LEAF: apply takes in[k], with p[k], as x[k], and needs only
// the other inputs as in[k]. It adds the element's shares of `sums` parameter gradients, from the first set's p1 on, to
// sum[0], sum[1], ... Where `repeatable` has bit k, input k may be one element for all of u. In a `pitched` operation
// each operand may have its own pitch from line to line (Args::line); in an `always_pitched` one it always has.
#pragma once

#include "leaf_math.h"

namespace leaf_cuda {

enum class Operation {
  forward,
  backward,
  double_backward,
  glu_forward,
  glu_backward,
  lstm_forward,
  lstm_backward,
  gru_forward,
  gru_backward
};

// Size of an array for an operation's sums: at least one element.
template <class Op>
constexpr int kSums = Op::sums ? Op::sums : 1;

// The arguments of LEAF among an operation's inputs.
template <class Op, class M>
LEAF_FUNCTION void take_arguments(const typename M::T* in, const Parameters<typename M::T>* p,
                                  Argument<typename M::T>* x) {
  for (int k = 0; k < Op::arguments; ++k) x[k] = argument<M>(in[k], p[k].p3);
}

// The whole operation.
template <class Op, class M>
LEAF_FUNCTION void apply(const typename M::T* in, const Parameters<typename M::T>* p, typename M::T* out,
                         typename M::T* sum) {
  Argument<typename M::T> x[Op::arguments];
  take_arguments<Op, M>(in, p, x);
  Op::template apply<M>(x, in, p, out, sum);
}

// Returns grad times the derivative of leaf(x) by u; adds grad times those by the parameters to sum[0..3].
template <class M, class T = typename M::T>
LEAF_FUNCTION T gradient(const Argument<T>& x, const T& grad, const Parameters<T>& p, T* sum) {
  const Partials<T> d = leaf_partials<M>(x, grad, p);
  sum[0] += d.p1;
  sum[1] += d.p2;
  sum[2] += d.p3;
  sum[3] += grad;
  return d.u;
}

// (u) → y
struct Forward {
  static constexpr Operation operation = Operation::forward;
  static constexpr int inputs = 1, arguments = 1, outputs = 1, sets = 1, sums = 0;
  static constexpr unsigned repeatable = 0;
  static constexpr bool pitched = false, always_pitched = false;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const Argument<T>* x, const T* in, const Parameters<T>* p, T* out, T*) {
    out[0] = leaf<M>(x[0], p[0]);
  }
};

// (u, grad) → du, Σ dp1, ..., Σ dp4
struct Backward {
  static constexpr Operation operation = Operation::backward;
  static constexpr int inputs = 2, arguments = 1, outputs = 1, sets = 1, sums = 4;
  static constexpr unsigned repeatable = 0b10;
  static constexpr bool pitched = false, always_pitched = false;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const Argument<T>* x, const T* in, const Parameters<T>* p, T* out, T* sum) {
    out[0] = gradient<M>(x[0], in[1], p[0], sum);
  }
};

// (u, grad, v) and a second set of parameters, v1, ..., v4 → dgrad, du, Σ dp1, Σ dp2, Σ dp3. The gradient of p4 is 0.
struct DoubleBackward {
  static constexpr Operation operation = Operation::double_backward;
  static constexpr int inputs = 3, arguments = 1, outputs = 2, sets = 2, sums = 3;
  static constexpr unsigned repeatable = 0b110;
  static constexpr bool pitched = false, always_pitched = false;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const Argument<T>* x, const T* in, const Parameters<T>* p, T* out, T* sum) {
    const Along<T> d = leaf_along<M>(x[0], in[1], p[0], in[2], p[1]);
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
  static constexpr int inputs = 2, arguments = 1, outputs = 1, sets = 1, sums = 0;
  static constexpr unsigned repeatable = 0b10;
  static constexpr bool pitched = true, always_pitched = false;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const Argument<T>* x, const T* in, const Parameters<T>* p, T* out, T*) {
    out[0] = leaf<M>(x[0], p[0]) * in[1];
  }
};

// (u, b, grad) → du, db, Σ dp1, ..., Σ dp4
struct GluBackward {
  static constexpr Operation operation = Operation::glu_backward;
  static constexpr int inputs = 3, arguments = 1, outputs = 2, sets = 1, sums = 4;
  static constexpr unsigned repeatable = 0b110;
  static constexpr bool pitched = true, always_pitched = false;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const Argument<T>* x, const T* in, const Parameters<T>* p, T* out, T* sum) {
    out[0] = gradient<M>(x[0], in[2] * in[1], p[0], sum);
    out[1] = in[2] * leaf_again<M>(x[0], p[0]);
  }
};

// The pointwise part of an LSTM step, with LEAF in place of its sigmoids and tanhs. From the pre-activations of the
// input gate, the forget gate, the candidate and the output gate, and from the cell state: (i, f, g, o, c) → h', c'
//   c' = leaf(f)·c + leaf(i)·leaf(g)    h' = leaf(o)·leaf(c')
// with one set of parameters each for i, f, g, o and c', in this order.
struct LstmForward {
  static constexpr Operation operation = Operation::lstm_forward;
  static constexpr int inputs = 5, arguments = 4, outputs = 2, sets = 5, sums = 0;
  static constexpr unsigned repeatable = 0;
  static constexpr bool pitched = true, always_pitched = true;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const Argument<T>* x, const T* in, const Parameters<T>* p, T* out, T*) {
    const T i = leaf<M>(x[0], p[0]), f = leaf<M>(x[1], p[1]), g = leaf<M>(x[2], p[2]), o = leaf<M>(x[3], p[3]);
    out[1] = M::multiply_add(f, in[4], i * g);
    out[0] = o * leaf<M>(argument<M>(out[1], p[4].p3), p[4]);
  }
};

// (i, f, g, o, c, dh', dc') → di, df, dg, do, dc, and the sums of all five sets
struct LstmBackward {
  static constexpr Operation operation = Operation::lstm_backward;
  static constexpr int inputs = 7, arguments = 4, outputs = 5, sets = 5, sums = 20;
  static constexpr unsigned repeatable = 0;
  static constexpr bool pitched = true, always_pitched = true;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const Argument<T>* x, const T* in, const Parameters<T>* p, T* out, T* sum) {
    const T i = leaf_again<M>(x[0], p[0]), f = leaf_again<M>(x[1], p[1]), g = leaf_again<M>(x[2], p[2]),
            o = leaf_again<M>(x[3], p[3]);
    const Argument<T> c = argument<M>(M::multiply_add(f, in[4], i * g), p[4].p3);
    const T dc = in[6] + gradient<M>(c, in[5] * o, p[4], sum + 16);
    out[0] = gradient<M>(x[0], dc * g, p[0], sum);
    out[1] = gradient<M>(x[1], dc * in[4], p[1], sum + 4);
    out[2] = gradient<M>(x[2], dc * i, p[2], sum + 8);
    out[3] = gradient<M>(x[3], in[5] * leaf_again<M>(c, p[4]), p[3], sum + 12);
    out[4] = dc * f;
  }
};

// The pointwise part of a GRU step. From the pre-activations of the reset gate, the update gate and the candidate, the
// last in two parts, n from x and m from h, and from the state: (r, z, n, m, h) → h'
//   n' = leaf(n + leaf(r)·m)    h' = n' + leaf(z)·(h − n')
// with one set of parameters each for r, z and n', in this order.
struct GruForward {
  static constexpr Operation operation = Operation::gru_forward;
  static constexpr int inputs = 5, arguments = 2, outputs = 1, sets = 3, sums = 0;
  static constexpr unsigned repeatable = 0;
  static constexpr bool pitched = true, always_pitched = true;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const Argument<T>* x, const T* in, const Parameters<T>* p, T* out, T*) {
    const T r = leaf<M>(x[0], p[0]), z = leaf<M>(x[1], p[1]);
    const T n = leaf<M>(argument<M>(M::multiply_add(r, in[3], in[2]), p[2].p3), p[2]);
    out[0] = M::multiply_add(z, in[4] - n, n);
  }
};

// (r, z, n, m, h, dh') → dr, dz, dn, dm, dh, and the sums of all three sets
struct GruBackward {
  static constexpr Operation operation = Operation::gru_backward;
  static constexpr int inputs = 6, arguments = 2, outputs = 5, sets = 3, sums = 12;
  static constexpr unsigned repeatable = 0;
  static constexpr bool pitched = true, always_pitched = true;

  template <class M, class T = typename M::T>
  static LEAF_FUNCTION void apply(const Argument<T>* x, const T* in, const Parameters<T>* p, T* out, T* sum) {
    const T r = leaf_again<M>(x[0], p[0]), z = leaf_again<M>(x[1], p[1]);
    const Argument<T> u = argument<M>(M::multiply_add(r, in[3], in[2]), p[2].p3);
    const T n = leaf_again<M>(u, p[2]);
    out[2] = gradient<M>(u, in[5] * (1 - z), p[2], sum + 8);
    out[0] = gradient<M>(x[0], out[2] * in[3], p[0], sum);
    out[1] = gradient<M>(x[1], in[5] * (in[4] - n), p[1], sum + 4);
    out[3] = out[2] * r;
    out[4] = in[5] * z;
  }
};

template <class... Ops>
struct OperationList {
  static constexpr int count = sizeof...(Ops);

  // Calls f with an object of the operation's type.
  template <class F>
  static void dispatch(Operation operation, const F& f) {
    ((operation == Ops::operation ? f(Ops()) : void()), ...);
  }

  // Calls f with an object of each type.
  template <class F>
  static constexpr void for_each(const F& f) {
    (f(Ops()), ...);
  }

  // The largest of `of`(an object of each type).
  template <class F>
  static constexpr int most(const F& of) {
    int result = 0;
    ((result = of(Ops()) > result ? of(Ops()) : result), ...);
    return result;
  }
};

using Operations = OperationList<Forward, Backward, DoubleBackward, GluForward, GluBackward, LstmForward, LstmBackward,
                                 GruForward, GruBackward>;
static_assert(Operations::count == static_cast<int>(Operation::gru_backward) + 1, "an operation is not in the list");

constexpr int kMaxInputs = Operations::most([](auto op) { return decltype(op)::inputs; });
constexpr int kMaxOutputs = Operations::most([](auto op) { return decltype(op)::outputs; });
constexpr int kMaxParameters = Operations::most([](auto op) { return 4 * decltype(op)::sets; });
constexpr int kMaxSums = Operations::most([](auto op) { return decltype(op)::sums; });

}  // namespace leaf_cuda
