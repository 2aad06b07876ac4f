// Recurrent layers: gradients, and the layer as tensor operations for what the kernels cannot do.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>

#include "leaf_checks.h"
#include "leaf_composite.h"
#include "recurrent_layer.h"

namespace leaf_cuda {
namespace {

// The layer as differentiable tensor operations (leaf_composite.h).
FiveTensors composite(const Layer& l) {
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  const Cell& cell = l.cell();
  const Steps steps(l);
  const int64_t hidden = l.h.size(1), count = steps.count();
  const auto dtype = l.x.scalar_type(), math = at::toOpMathType(dtype);
  Parameters<Tensor> p[5];
  for (int set = 0; set < cell.sets; ++set) {
    const auto of_set = [&](int q) { return l.parameters[q]->select(0, set).to(math); };
    p[set] = {of_set(0), of_set(1), of_set(2), of_set(3)};
  }
  std::vector<Tensor> outputs(count), cells(count), pre(count);
  const Tensor by_x = at::linear(l.x.flatten(0, -2), l.weight_ih, l.bias_ih);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t step = steps.at(k);
    const auto before = [&](const Tensor& initial, const std::vector<Tensor>& all) {
      return joined(steps.previous(step, initial, [&](int64_t s, int64_t n) { return all[s].narrow(0, 0, n); }));
    };
    const Tensor state = before(l.h, outputs), rows = steps.rows(by_x, step);
    const Tensor by_h = at::linear(state, l.weight_hh, l.bias_hh);
    pre[step] = l.c ? rows + by_h
                    : at::cat({rows.narrow(1, 2 * hidden, hidden),
                               rows.narrow(1, 0, 2 * hidden) + by_h.narrow(1, 0, 2 * hidden),
                               by_h.narrow(1, 2 * hidden, hidden)},
                              1);
    Tensor in[5], out[2];
    for (int j = 0; j < 4; ++j) in[j] = pre[step].narrow(1, cell.column[j] * hidden, hidden).to(math);
    in[4] = (l.c ? before(*l.c, cells) : state).to(math);
    if (l.c) {
      apply<LstmForward, TensorMath>(in, p, out, nullptr);
      cells[step] = out[1].to(dtype);
    } else {
      apply<GruForward, TensorMath>(in, p, out, nullptr);
    }
    outputs[step] = out[0].to(dtype);
  }
  const auto all = [&](const std::vector<Tensor>& parts) {
    return at::cat(parts).view(sizes_with(l.x, parts[0].size(1)));
  };
  const auto last = [&](const std::vector<Tensor>& parts) { return steps.last([&](int64_t s) { return parts[s]; }); };
  const auto none = [&] { return at::empty({0}, l.x.options()); };
  return {all(outputs), last(outputs), l.c ? last(cells) : none(), l.c ? all(cells) : none(), all(pre)};
}

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr Dispatched<leaf_recurrent_forward> call_forward{kRecurrentForward};
constexpr Dispatched<leaf_recurrent_backward> call_backward{kRecurrentBackward};

struct RecurrentNode : torch::autograd::Function<RecurrentNode> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& h, const OptionalTensor& c,
                               const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                               const OptionalTensor& bias_hh, const Tensor& p1, const Tensor& p2, const Tensor& p3,
                               const Tensor& p4, const OptionalTensor& batch_sizes, bool reverse) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [output, h_n, c_n, cells, pre] =
        call_forward(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, p1, p2, p3, p4, batch_sizes, reverse);
    const auto given = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
    context->save_for_backward({x, h, given(c), weight_ih, weight_hh, given(bias_ih), given(bias_hh), p1, p2, p3, p4,
                                given(batch_sizes), output, cells, pre});
    context->saved_data["reverse"] = reverse;
    context->set_materialize_grads(false);
    if (c)
      context->mark_non_differentiable({cells, pre});
    else
      context->mark_non_differentiable({c_n, cells, pre});
    return {output, h_n, c_n, cells, pre};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto s = context->get_saved_variables();
    const bool reverse = context->saved_data["reverse"].toBool();
    const auto mask = needed<11>(*context, s);
    variable_list results(13);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return results;
    if (at::GradMode::is_enabled()) {
      differentiable_backward(grads, s, reverse, mask, results);
      return results;
    }
    const auto gradients = call_backward(optional(grads[0]), optional(grads[1]), optional(grads[2]), s[12], s[13],
                                         s[14], s[0], s[1], optional(s[2]), s[3], s[4], optional(s[5]), optional(s[6]),
                                         s[7], s[8], s[9], s[10], optional(s[11]), reverse, mask);
    std::apply([&](const auto&... g) { results = {g...}; }, gradients);
    results.resize(13);
    return results;
  }

  // For gradients of gradients: runs the layer again as tensor operations and leaves its gradients to autograd.
  static void differentiable_backward(const variable_list& grads, const variable_list& s, bool reverse,
                                      const std::array<bool, 11>& mask, variable_list& results) {
    const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
    // Each input gets a node of its own, so that a tensor that is passed as two inputs gets the gradient of each.
    variable_list inputs, outputs, of_outputs, wanted;
    for (int k = 0; k < 11; ++k) inputs.push_back(s[k].defined() ? s[k].view_as(s[k]) : s[k]);
    const OptionalTensor c = optional(inputs[2]), bias_ih = optional(inputs[5]), bias_hh = optional(inputs[6]);
    const ParameterList parameters = {inputs[7], inputs[8], inputs[9], inputs[10]};
    const auto [output, h_n, c_n, cells, pre] = composite(
        {inputs[0], inputs[1], c, inputs[3], inputs[4], bias_ih, bias_hh, parameters, optional(s[11]), reverse});
    const Variable all[] = {output, h_n, c_n};
    for (int k = 0; k < 3; ++k)
      if (grads[k].defined()) {
        outputs.push_back(all[k]);
        of_outputs.push_back(grads[k]);
      }
    for (int k = 0; k < 11; ++k)
      if (mask[k]) wanted.push_back(inputs[k]);
    const auto gradients = torch::autograd::grad(outputs, wanted, of_outputs, /*retain_graph=*/true,
                                                 /*create_graph=*/true, /*allow_unused=*/true);
    for (size_t k = 0, next = 0; k < 11; ++k)
      if (mask[k]) results[k] = gradients[next++];
  }
};

FiveTensors forward_autograd(const Tensor& x, const Tensor& h, const OptionalTensor& c, const Tensor& weight_ih,
                             const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                             const Tensor& p1, const Tensor& p2, const Tensor& p3, const Tensor& p4,
                             const OptionalTensor& batch_sizes, bool reverse) {
  const ParameterList parameters = {p1, p2, p3, p4};
  const Layer layer{x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, parameters, batch_sizes, reverse};
  check_layouts(layer);
  const bool differentiable = any_requires_grad(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, p1, p2, p3, p4);
  if (any_tangent(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, p1, p2, p3, p4) ||
      (differentiable && inside_functorch())) {
    check_layer(layer);
    return composite(layer);
  }
  if (differentiable) {
    const auto results =
        RecurrentNode::apply(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, p1, p2, p3, p4, batch_sizes, reverse);
    return {results[0], results[1], results[2], results[3], results[4]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_forward(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, p1, p2, p3, p4, batch_sizes, reverse);
}

ElevenTensors backward_autograd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                const OptionalTensor& grad_c_n, const Tensor& output, const Tensor& cells,
                                const Tensor& pre, const Tensor& x, const Tensor& h, const OptionalTensor& c,
                                const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                const OptionalTensor& bias_hh, const Tensor& p1, const Tensor& p2, const Tensor& p3,
                                const Tensor& p4, const OptionalTensor& batch_sizes, bool reverse,
                                std::array<bool, 11> mask) {
  const auto any = [&](auto question) {
    return question(grad_output, grad_h_n, grad_c_n, output, cells, pre, x, h, c, weight_ih, weight_hh, bias_ih,
                    bias_hh, p1, p2, p3, p4);
  };
  TORCH_CHECK_NOT_IMPLEMENTED(!any([](const auto&... t) { return any_requires_grad(t...); }) &&
                                  !any([](const auto&... t) { return any_tangent(t...); }),
                              "leaf_recurrent_backward has no gradient of its own; differentiate "
                              "leaf_recurrent_forward with create_graph=True");
  const ParameterList parameters = {p1, p2, p3, p4};
  check_layouts({x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, parameters, batch_sizes, reverse});
  check_layout("leaf_recurrent_backward", "grad_output", grad_output);
  check_layout("leaf_recurrent_backward", "grad_h_n", grad_h_n);
  check_layout("leaf_recurrent_backward", "grad_c_n", grad_c_n);
  check_layout("leaf_recurrent_backward", "output", output);
  check_layout("leaf_recurrent_backward", "cells", cells);
  check_layout("leaf_recurrent_backward", "pre", pre);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_backward(grad_output, grad_h_n, grad_c_n, output, cells, pre, x, h, c, weight_ih, weight_hh, bias_ih,
                       bias_hh, p1, p2, p3, p4, batch_sizes, reverse, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(leaf_cuda, Autograd, library) {
  if (!is_unregistered(c10::DispatchKey::Autograd, kRecurrentForward)) return;
  library.impl("leaf_recurrent_forward", forward_autograd);
  library.impl("leaf_recurrent_backward", backward_autograd);
}

}  // namespace leaf_cuda
