// Gradients, gradients of gradients, and tangents of the operators.
#include <torch/csrc/autograd/custom_function.h>

#include "leaf_checks.h"
#include "leaf_composite.h"

namespace leaf_cuda {
namespace {

constexpr Dispatched<leaf_forward> call_forward{kForward};
constexpr Dispatched<leaf_backward> call_backward{kBackward};
constexpr Dispatched<leaf_double_backward> call_double_backward{kDoubleBackward};

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LeafBackwardNode : torch::autograd::Function<LeafBackwardNode> {
  // Returns the gradients that `mask` asks for, of tensors that are given, one after another.
  static variable_list forward(AutogradContext* context, const Tensor& grad, const Tensor& u, const Tensor& p1,
                               const OptionalTensor& p2, const Tensor& p3, const OptionalTensor& p4,
                               std::array<bool, 5> mask) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({grad, u, p1, p2.value_or(Tensor()), p3, p4.value_or(Tensor())});
    context->saved_data["mask"] = mask;
    context->set_materialize_grads(false);
    variable_list results;
    const auto keep = [&](const auto&... t) { ((t.defined() ? results.push_back(t) : void()), ...); };
    std::apply(keep, call_backward(grad, u, p1, p2, p3, p4, mask));
    return results;
  }

  // Puts these in their places among the operator's five results, undefined where not asked for.
  static FiveTensors spread(const std::array<bool, 5>& mask, const ParameterList& parameters,
                            const variable_list& results) {
    std::array<Tensor, 5> all;
    auto next = results.begin();
    for (size_t k = 0; k < all.size(); ++k)
      if (mask[k] && (k == 0 || parameters[k - 1])) all[k] = *next++;
    return std::tuple_cat(all);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const ParameterList parameters = {saved[2], optional(saved[3]), saved[4], optional(saved[5])};
    const auto [v, v1, v2, v3, v4] = spread(context->saved_data["mask"].to<std::array<bool, 5>>(), parameters, grads);
    const auto [dgrad, du, dp1, dp2, dp3, dp4] =
        call_double_backward(optional(v), optional(v1), optional(v2), optional(v3), optional(v4), saved[0], saved[1],
                             saved[2], parameters[1], saved[4], parameters[3], needed<6>(*context, saved));
    return {dgrad, du, dp1, dp2, dp3, dp4, Tensor()};
  }
};

struct LeafNode : torch::autograd::Function<LeafNode> {
  static Tensor forward(AutogradContext* context, const Tensor& u, const Tensor& p1, const OptionalTensor& p2,
                        const Tensor& p3, const OptionalTensor& p4) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({u, p1, p2.value_or(Tensor()), p3, p4.value_or(Tensor())});
    context->set_materialize_grads(false);
    return call_forward(u, p1, p2, p3, p4);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(5);
    const auto saved = context->get_saved_variables();
    const auto [du, dp1, dp2, dp3, dp4] = call_backward(grads[0], saved[0], saved[1], optional(saved[2]), saved[3],
                                                        optional(saved[4]), needed<5>(*context, saved));
    return {du, dp1, dp2, dp3, dp4};
  }
};

Tensor leaf_forward_autograd(const Tensor& u, const Tensor& p1, const OptionalTensor& p2, const Tensor& p3,
                             const OptionalTensor& p4) {
  const ParameterList parameters = {p1, p2, p3, p4};
  check_layout(u, parameters);
  const bool differentiable = any_requires_grad(u, p1, p2, p3, p4);
  if (any_tangent(u, p1, p2, p3, p4) || (differentiable && inside_functorch())) {
    check(u, parameters);
    return Composite(u, parameters).forward();
  }
  if (differentiable) return LeafNode::apply(u, p1, p2, p3, p4);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_forward(u, p1, p2, p3, p4);
}

FiveTensors leaf_backward_autograd(const Tensor& grad, const Tensor& u, const Tensor& p1, const OptionalTensor& p2,
                                   const Tensor& p3, const OptionalTensor& p4, std::array<bool, 5> mask) {
  const ParameterList parameters = {p1, p2, p3, p4};
  check_layout("leaf_backward", "grad", grad);
  check_layout(u, parameters);
  const bool differentiable = any_requires_grad(grad, u, p1, p2, p3, p4);
  if (any_tangent(grad, u, p1, p2, p3, p4) || (differentiable && inside_functorch())) {
    check(u, parameters);
    check_like("leaf_backward: grad", grad, "u", u);
    return Composite(u, parameters).backward(grad, mask);
  }
  if (differentiable) {
    const auto results = LeafBackwardNode::apply(grad, u, p1, p2, p3, p4, mask);
    return LeafBackwardNode::spread(mask, parameters, results);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_backward(grad, u, p1, p2, p3, p4, mask);
}

SixTensors leaf_double_backward_autograd(const OptionalTensor& v, const OptionalTensor& v1, const OptionalTensor& v2,
                                         const OptionalTensor& v3, const OptionalTensor& v4, const Tensor& grad,
                                         const Tensor& u, const Tensor& p1, const OptionalTensor& p2, const Tensor& p3,
                                         const OptionalTensor& p4, std::array<bool, 6> mask) {
  const ParameterList parameters = {p1, p2, p3, p4};
  check_layout("leaf_double_backward", "grad", grad);
  check_layout("leaf_double_backward", "v", v);
  check_layout("leaf_double_backward", "v1", v1);
  check_layout("leaf_double_backward", "v2", v2);
  check_layout("leaf_double_backward", "v3", v3);
  check_layout("leaf_double_backward", "v4", v4);
  check_layout(u, parameters);
  if (any_tangent(v, v1, v2, v3, v4, grad, u, p1, p2, p3, p4) ||
      any_requires_grad(v, v1, v2, v3, v4, grad, u, p1, p2, p3, p4)) {
    check_double_backward(v, {v1, v2, v3, v4}, grad, u, parameters);
    return Composite(u, parameters).double_backward(grad, v, {v1, v2, v3, v4}, mask);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_double_backward(v, v1, v2, v3, v4, grad, u, p1, p2, p3, p4, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(leaf_cuda, Autograd, library) {
  if (!is_unregistered(c10::DispatchKey::Autograd)) return;
  library.impl("leaf_forward", leaf_forward_autograd);
  library.impl("leaf_backward", leaf_backward_autograd);
  library.impl("leaf_double_backward", leaf_double_backward_autograd);
}

}  // namespace leaf_cuda
