// The formula and its derivatives, once: for scalars, SIMD vectors, CUDA threads and at::Tensor alike.
//
//   y      = (p1·u + p2)·σ(p3·u) + p4         Bodyanskiy & Kostiuk 2023, doi 10.47839/ijc.22.3.3225
//   dL/du  = g·(p1·s + l·s·s̄·p3)              l = p1·u + p2, s = σ(p3·u), s̄ = σ(−p3·u)
//   dL/dp1 = Σ g·u·s    dL/dp2 = Σ g·s    dL/dp3 = Σ g·l·s·s̄·u    dL/dp4 = Σ g
//
// M supplies the arithmetic: a type M::T with + - *, and
//   M::exp_neg_abs(z)           e^(−|z|), 0 for infinite z, NaN for NaN
//   M::reciprocal(x)            1/x for x in [1, 2]
//   M::divide(a, b)             optional: a/b for b in [1, 2], where that costs no more than the reciprocal
//   M::multiply_add(a, b, c)    a·b + c, used where a compiler could fuse either of two products, so that results are
//                               bitwise the same wherever the function is inlined
//   M::select(z, a, b)          a where z ≥ 0, else b
//   M::exponent_scale           optional: a factor above 0 by which exp_neg_abs and select expect z multiplied
#pragma once

#if defined(__CUDACC__)
#define LEAF_FUNCTION __host__ __device__ __forceinline__
#else
#define LEAF_FUNCTION inline __attribute__((always_inline))
#endif

namespace leaf_cuda {

template <class T>
struct Parameters {
  T p1, p2, p3, p4;
};

template <class T>
struct Sigmoid {
  T value;  // σ(z)
  T slope;  // σ(z)·σ(−z)
};

// z = p3·u in the form that exp_neg_abs and select take: times exponent_scale if there is one.
template <class M>
LEAF_FUNCTION typename M::T scaled_z(const typename M::T& p3, const typename M::T& u) {
  if constexpr (requires { M::exponent_scale; }) {
    return (p3 * M::exponent_scale) * u;
  } else {
    return p3 * u;
  }
}

// u with the first half of σ(p3·u), which backends may compute well before the rest.
template <class T>
struct Argument {
  T u;
  T z;  // scaled_z, or another number of that sign
  T e;  // e^(−|p3·u|)
};

template <class M>
LEAF_FUNCTION Argument<typename M::T> argument(const typename M::T& u, const typename M::T& p3) {
  const typename M::T z = scaled_z<M>(p3, u);
  return {u, z, M::exp_neg_abs(z)};
}

// σ(p3·u) and its slope, both from e = e^(−|z|) and r = σ(|z|) = 1/(1 + e), which neither overflow nor cancel: 1 − σ(z)
// in float32 has lost every digit by z = 17. The complement c = σ(−|z|) is e·r. The slope is c − c² and not c·r, which
// would have r's error twice.
template <class M>
LEAF_FUNCTION Sigmoid<typename M::T> sigmoid(const Argument<typename M::T>& x) {
  using T = typename M::T;
  const T r = M::reciprocal(1 + x.e);
  const T complement = x.e * r;
  return {M::select(x.z, r, complement), complement - complement * complement};
}

// σ(p3·u) alone. One division, where M has it, is as exact and saves a product.
template <class M>
LEAF_FUNCTION typename M::T sigmoid_value(const Argument<typename M::T>& x) {
  using T = typename M::T;
  if constexpr (requires(T t) { M::divide(t, t); }) {
    return M::divide(M::select(x.z, T{} + 1, x.e), 1 + x.e);
  } else {
    return sigmoid<M>(x).value;
  }
}

template <class M>
LEAF_FUNCTION typename M::T leaf(const Argument<typename M::T>& x, const Parameters<typename M::T>& p) {
  return (p.p1 * x.u + p.p2) * sigmoid_value<M>(x) + p.p4;
}

// leaf(x) in a backward that also takes the derivatives there: it computes σ as they do, so that the compiler shares
// it.
template <class M>
LEAF_FUNCTION typename M::T leaf_again(const Argument<typename M::T>& x, const Parameters<typename M::T>& p) {
  return (p.p1 * x.u + p.p2) * sigmoid<M>(x).value + p.p4;
}

// g times the derivatives of y with respect to u, p1, p2 and p3 (for p4 it is g itself).
template <class T>
struct Partials {
  T u, p1, p2, p3;
};

template <class M>
LEAF_FUNCTION Partials<typename M::T> leaf_partials(const Argument<typename M::T>& x, const typename M::T& g,
                                                    const Parameters<typename M::T>& p) {
  using T = typename M::T;
  const Sigmoid<T> s = sigmoid<M>(x);
  const T ls = (p.p1 * x.u + p.p2) * s.slope;
  const T gs = g * s.value;
  return {g * M::multiply_add(p.p1, s.value, ls * p.p3), gs * x.u, gs, (g * ls) * x.u};
}

// The derivative of y along v = (v, v1, v2, v3, v4), a direction of (u, p1, p2, p3, p4), and g times the derivatives of
// that with respect to u, p1, p2 and p3 (for p4 it is 0): what the backward of leaf_partials needs.
//
//   D = l'·s + l·s·s̄·z' + v4      l' = p1·v + v1·u + v2, z' = p3·v + v3·u
template <class T>
struct Along {
  T value;
  Partials<T> partials;
};

template <class M>
LEAF_FUNCTION Along<typename M::T> leaf_along(const Argument<typename M::T>& x, const typename M::T& g,
                                              const Parameters<typename M::T>& p, const typename M::T& v,
                                              const Parameters<typename M::T>& vp) {
  using T = typename M::T;
  const T& u = x.u;
  const Sigmoid<T> s = sigmoid<M>(x);
  const T curvature = s.slope * (1 - 2 * s.value);
  const T l = p.p1 * u + p.p2, dl = p.p1 * v + vp.p1 * u + vp.p2;
  const T dz = p.p3 * v + vp.p3 * u;
  const T slope_dz = s.slope * dz, ls = l * s.slope;
  const T by_z = dl * s.slope + l * curvature * dz;
  return {dl * s.value + l * slope_dz + vp.p4,
          {g * (vp.p1 * s.value + p.p3 * by_z + p.p1 * slope_dz + ls * vp.p3), g * (v * s.value + u * slope_dz),
           g * slope_dz, g * (by_z * u + ls * v)}};
}

}  // namespace leaf_cuda
