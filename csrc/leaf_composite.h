// The operators as differentiable tensor operations, for what the kernels cannot do: third derivatives, tangents, and
// operators called inside torch.func. Also the predicates that decide when these are used.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include "leaf_math.h"
#include "leaf_ops.h"

namespace leaf_cuda {

struct TensorMath {
  using T = Tensor;
  static T multiply_add(const T& a, const T& b, const T& c) { return a * b + c; }
};

// Uses at::sigmoid, whose derivative autograd knows, not e^(−|z|): its derivative would be wrong at z = 0.
template <>
inline Argument<Tensor> argument<TensorMath>(const Tensor& u, const Tensor& p3) {
  return {u, p3 * u, Tensor()};
}
template <>
inline Tensor sigmoid_value<TensorMath>(const Argument<Tensor>& x) {
  return at::sigmoid(x.z);
}
template <>
inline Sigmoid<Tensor> sigmoid<TensorMath>(const Argument<Tensor>& x) {
  const Tensor s = sigmoid_value<TensorMath>(x);
  return {s, s * at::sigmoid(-x.z)};
}

inline bool requires_grad(const OptionalTensor& t) { return t && t->requires_grad(); }

// Whether t carries a tangent of forward-mode differentiation.
inline bool has_tangent(const OptionalTensor& t) { return t && t->_fw_grad(/*level=*/0).defined(); }

template <class... Tensors>
bool any_tangent(const Tensors&... t) {
  return (has_tangent(t) || ...);
}

// Whether a torch.func transform is active, inside which PyTorch refuses C++ autograd nodes.
inline bool inside_functorch() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

template <class... Tensors>
bool any_requires_grad(const Tensors&... t) {
  return at::GradMode::is_enabled() && (requires_grad(t) || ...);
}

inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Which of the saved tensors need a gradient; the index of needs_input_grad counts only inputs that are tensors.
template <size_t n>
std::array<bool, n> needed(const torch::autograd::AutogradContext& context,
                           const torch::autograd::variable_list& saved) {
  std::array<bool, n> mask;
  size_t edge = 0;
  for (size_t k = 0; k < n; ++k) mask[k] = saved[k].defined() && context.needs_input_grad(edge++);
  return mask;
}

// (Inside torch.func, leaf_cuda.leaf uses LeafFunction instead, which is faster.)
class Composite {
 public:
  Composite(const Tensor& u, const ParameterList& parameters)
      : parameters_(parameters), u_(u), math_(at::toOpMathType(u.scalar_type())) {}

  Tensor forward() const { return activated().to(u_.scalar_type()); }

  FiveTensors backward(const Tensor& grad, std::array<bool, 5> mask) const {
    const Parameters<Tensor> p = in_math(parameters_);
    const Tensor g = in_math(grad);
    return summed(leaf_partials<TensorMath>(argument_of(p), g, p), g, mask);
  }

  SixTensors double_backward(const Tensor& grad, const OptionalTensor& v, const ParameterList& vp,
                             std::array<bool, 6> mask) const {
    const Parameters<Tensor> p = in_math(parameters_);
    const Along<Tensor> d = leaf_along<TensorMath>(argument_of(p), in_math(grad), p, in_math(v), in_math(vp));
    const Tensor dgrad = mask[0] ? d.value.to(grad.scalar_type()) : Tensor();
    return std::tuple_cat(std::tuple(dgrad), summed(d.partials, Tensor(), {mask[1], mask[2], mask[3], mask[4], false}));
  }

  // For leaf_glu, whose a is u here.
  Tensor glu_forward(const Tensor& b) const { return (activated() * in_math(b)).to(u_.scalar_type()); }

  // da, db, dp1, ..., dp4
  SixTensors glu_backward(const Tensor& grad, const Tensor& b, std::array<bool, 6> mask) const {
    const Parameters<Tensor> p = in_math(parameters_);
    const Argument<Tensor> x = argument_of(p);
    const Tensor g = in_math(grad), through = g * in_math(b);
    const auto [da, dp1, dp2, dp3, dp4] =
        summed(leaf_partials<TensorMath>(x, through, p), through, {mask[0], mask[2], mask[3], mask[4], mask[5]});
    return {da, mask[1] ? (g * leaf<TensorMath>(x, p)).to(b.scalar_type()) : Tensor(), dp1, dp2, dp3, dp4};
  }

 private:
  const ParameterList& parameters_;
  const Tensor& u_;
  const at::ScalarType math_;

  // The part of a parameter's shape that broadcasts to u: without any leading 1s beyond u's dimensions.
  c10::SymIntArrayRef aligned(const Tensor& p) const {
    return p.sym_sizes().slice(std::max<int64_t>(0, p.dim() - u_.dim()));
  }

  Tensor in_math(const OptionalTensor& t) const {
    if (!t) return at::zeros({}, u_.options().dtype(math_));
    return (t->dim() > u_.dim() ? t->view_symint(aligned(*t)) : *t).to(math_);
  }
  Parameters<Tensor> in_math(const ParameterList& p) const {
    return {in_math(p[0]), in_math(p[1]), in_math(p[2]), in_math(p[3])};
  }

  Argument<Tensor> argument_of(const Parameters<Tensor>& p) const { return argument<TensorMath>(in_math(u_), p.p3); }
  Tensor activated() const {
    const Parameters<Tensor> p = in_math(parameters_);
    return leaf<TensorMath>(argument_of(p), p);
  }

  FiveTensors summed(const Partials<Tensor>& d, const Tensor& p4, std::array<bool, 5> mask) const {
    const std::array<const Tensor*, 4> shares = {&d.p1, &d.p2, &d.p3, &p4};
    std::array<Tensor, 4> dp;
    for (int q = 0; q < 4; ++q) {
      if (!mask[q + 1] || !parameters_[q]) continue;
      const Tensor& p = *parameters_[q];
      dp[q] = shares[q]->sum_to_size_symint(aligned(p)).view_symint(p.sym_sizes()).to(p.scalar_type());
    }
    return {mask[0] ? d.u.to(u_.scalar_type()) : Tensor(), dp[0], dp[1], dp[2], dp[3]};
  }
};

}  // namespace leaf_cuda
