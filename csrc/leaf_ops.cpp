#include "leaf_ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "leaf_checks.h"
#include "leaf_pass.h"

namespace leaf_cuda {

Tensor leaf_forward(Run run, const Tensor& u, const Tensor& p1, const OptionalTensor& p2, const Tensor& p3,
                    const OptionalTensor& p4) {
  const ParameterList parameters = {p1, p2, p3, p4};
  check(u, parameters);
  Tensor source;
  Tensor y = result_like(u, source);
  if (u.numel() == 0) return y;
  Pass pass(Operation::forward, source, parameters);
  pass.add_output(y);
  pass.run(run);
  return y;
}

FiveTensors leaf_backward(Run run, const Tensor& grad, const Tensor& u, const Tensor& p1, const OptionalTensor& p2,
                          const Tensor& p3, const OptionalTensor& p4, std::array<bool, 5> mask) {
  const ParameterList parameters = {p1, p2, p3, p4};
  const std::array<bool, 4> wanted = {mask[1], mask[2], mask[3], mask[4]};
  check(u, parameters);
  check_like("leaf_backward: grad", grad, "u", u);
  Tensor du, source = u;
  if (mask[0] || !u.is_non_overlapping_and_dense()) du = result_like(u, source);
  const auto finished = [&](const std::array<Tensor, 4>& dp) {
    return FiveTensors(mask[0] ? du : Tensor(), dp[0], dp[1], dp[2], dp[3]);
  };
  if (u.numel() == 0) return finished(no_sums(parameters, wanted));
  Pass pass(Operation::backward, source, parameters);
  pass.add_input(grad);
  pass.add_output(mask[0] ? du : Tensor());
  return finished(pass.run_with_sums(run, wanted));
}

SixTensors leaf_double_backward(Run run, const OptionalTensor& v, const OptionalTensor& v1, const OptionalTensor& v2,
                                const OptionalTensor& v3, const OptionalTensor& v4, const Tensor& grad, const Tensor& u,
                                const Tensor& p1, const OptionalTensor& p2, const Tensor& p3, const OptionalTensor& p4,
                                std::array<bool, 6> mask) {
  const ParameterList parameters = {p1, p2, p3, p4};
  const std::array<bool, 4> wanted = {mask[2], mask[3], mask[4], false};
  check_double_backward(v, {v1, v2, v3, v4}, grad, u, parameters);
  Tensor du, source = u;
  if (mask[1] || !u.is_non_overlapping_and_dense()) du = result_like(u, source);
  const Tensor dgrad = mask[0] ? at::empty_like(source) : Tensor();
  const auto finished = [&](const std::array<Tensor, 4>& dp) {
    return SixTensors(dgrad, mask[1] ? du : Tensor(), dp[0], dp[1], dp[2], Tensor());
  };
  if (u.numel() == 0) return finished(no_sums(parameters, wanted));
  Pass pass(Operation::double_backward, source, {p1, p2, p3, p4, v1, v2, v3, v4});
  pass.add_input(grad);
  pass.add_input(v ? *v : at::zeros({}, u.options()).expand(u.sizes()));
  pass.add_output(dgrad);
  pass.add_output(mask[1] ? du : Tensor());
  return finished(pass.run_with_sums(run, wanted));
}

// ---- meta -----------------------------------------------------------------------------------------------------------

std::array<Tensor, 4> sums_meta(const ParameterList& parameters, std::array<bool, 4> wanted) {
  std::array<Tensor, 4> dp;
  for (int q = 0; q < 4; ++q)
    if (wanted[q] && parameters[q]) dp[q] = at::empty_symint(parameters[q]->sym_sizes(), parameters[q]->options());
  return dp;
}

namespace {

Tensor leaf_forward_meta(const Tensor& u, const Tensor& p1, const OptionalTensor& p2, const Tensor& p3,
                         const OptionalTensor& p4) {
  check(u, {p1, p2, p3, p4});
  return at::empty_like(u);
}

FiveTensors leaf_backward_meta(const Tensor& grad, const Tensor& u, const Tensor& p1, const OptionalTensor& p2,
                               const Tensor& p3, const OptionalTensor& p4, std::array<bool, 5> mask) {
  const ParameterList parameters = {p1, p2, p3, p4};
  check(u, parameters);
  check_like("leaf_backward: grad", grad, "u", u);
  const auto dp = sums_meta(parameters, {mask[1], mask[2], mask[3], mask[4]});
  return {mask[0] ? at::empty_like(u) : Tensor(), dp[0], dp[1], dp[2], dp[3]};
}

SixTensors leaf_double_backward_meta(const OptionalTensor& v, const OptionalTensor& v1, const OptionalTensor& v2,
                                     const OptionalTensor& v3, const OptionalTensor& v4, const Tensor& grad,
                                     const Tensor& u, const Tensor& p1, const OptionalTensor& p2, const Tensor& p3,
                                     const OptionalTensor& p4, std::array<bool, 6> mask) {
  const ParameterList parameters = {p1, p2, p3, p4};
  check_double_backward(v, {v1, v2, v3, v4}, grad, u, parameters);
  const auto dp = sums_meta(parameters, {mask[2], mask[3], mask[4], false});
  const auto like_u = [&](bool wanted) { return wanted ? at::empty_like(u) : Tensor(); };
  return {like_u(mask[0]), like_u(mask[1]), dp[0], dp[1], dp[2], Tensor()};
}

}  // namespace

// ---- registration ---------------------------------------------------------------------------------------------------

void define_operators(torch::Library& library) {
  // The operators take any layout, so Inductor need not give tensors the layout that they have in eager mode.
  const std::vector<at::Tag> tags = {at::Tag::flexible_layout, at::Tag::pt2_compliant_tag};
  library.def("leaf_forward(Tensor u, Tensor p1, Tensor? p2, Tensor p3, Tensor? p4) -> Tensor", tags);
  library.def(
      "leaf_backward(Tensor grad, Tensor u, Tensor p1, Tensor? p2, Tensor p3, Tensor? p4, bool[5] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  // The gradients of leaf_backward's tensors, but for p4, which has none. v, v1, ..., v4 are the incoming gradients of
  // its results du, dp1, ..., dp4; None stands for 0.
  library.def(
      "leaf_double_backward(Tensor? v, Tensor? v1, Tensor? v2, Tensor? v3, Tensor? v4, Tensor grad, Tensor u,"
      " Tensor p1, Tensor? p2, Tensor p3, Tensor? p4, bool[6] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  // If b is None, a and b lie side by side in a's last dimension, and a's gradient is that of both.
  library.def("leaf_glu_forward(Tensor a, Tensor? b, Tensor p1, Tensor? p2, Tensor p3, Tensor? p4) -> Tensor", tags);
  library.def(
      "leaf_glu_backward(Tensor grad, Tensor a, Tensor? b, Tensor p1, Tensor? p2, Tensor p3, Tensor? p4,"
      " bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  // A layer of an LSTM or, without c, of a GRU, over all steps. x is (steps, batch, features) or, with batch_sizes, the
  // rows of a packed sequence. Returns output, h_n, c_n and, for backward, all cell states and all pre-activations.
  library.def(
      "leaf_recurrent_forward(Tensor x, Tensor h, Tensor? c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih,"
      " Tensor? bias_hh, Tensor p1, Tensor p2, Tensor p3, Tensor p4, Tensor? batch_sizes, bool reverse)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  // The gradients of leaf_recurrent_forward's tensors, from x to p4.
  library.def(
      "leaf_recurrent_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor output, Tensor cells,"
      " Tensor pre, Tensor x, Tensor h, Tensor? c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? "
      "bias_hh,"
      " Tensor p1, Tensor p2, Tensor p3, Tensor p4, Tensor? batch_sizes, bool reverse, bool[11] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
}

bool is_unregistered(c10::DispatchKey key, const char* name) {
  const auto op = c10::Dispatcher::singleton().findOp({name, ""});
  return !op || !op->hasKernelForDispatchKey(key);
}

// A fragment, because TORCH_LIBRARY proper allows one copy of this library in a process.
TORCH_LIBRARY_FRAGMENT(leaf_cuda, library) {
  if (!c10::Dispatcher::singleton().findSchema({kForward, ""})) define_operators(library);
}

TORCH_LIBRARY_IMPL(leaf_cuda, Meta, library) {
  if (!is_unregistered(c10::DispatchKey::Meta)) return;
  library.impl("leaf_forward", leaf_forward_meta);
  library.impl("leaf_backward", leaf_backward_meta);
  library.impl("leaf_double_backward", leaf_double_backward_meta);
}

}  // namespace leaf_cuda
