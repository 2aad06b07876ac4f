// The gated unit y = leaf(a)·b: operators, and their gradients.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "leaf_checks.h"
#include "leaf_composite.h"
#include "leaf_pass.h"

namespace leaf_cuda {
namespace {

constexpr Names kGluNames = {"leaf_glu", "a"};

// a and b: two tensors, or the halves of one.
struct Gate {
  Tensor a, b;
  bool packed;
};

Gate gate_of(const Tensor& a, const OptionalTensor& b) {
  if (b) return {a, *b, false};
  TORCH_CHECK_VALUE(a.dim() > 0 && a.sym_size(-1) % 2 == 0, "leaf_glu: a has shape ", a.sym_sizes(),
                    "; without b its last dimension takes an even size, of a and b side by side");
  const c10::SymInt half = a.sym_size(-1) / 2;
  return {a.narrow_symint(-1, 0, half), a.narrow_symint(-1, half, half), true};
}

void check_gate(const Gate& gate, const ParameterList& parameters) {
  check(gate.a, parameters, kGluNames);
  check_like("leaf_glu: b", gate.b, "a", gate.a);
}

// Whether the pass goes line by line, with a pitch for each operand: for the halves of a packed tensor; and for two
// tensors that are not dense with the same layout, if a has a line_pitch and results like it are contiguous. Otherwise
// all operands go in a's memory order.
bool goes_by_lines(const Gate& gate) {
  if (gate.packed) return true;
  if (gate.a.is_non_overlapping_and_dense() && same_layout(gate.a, gate.b)) return false;
  return line_pitch(gate.a) && at::empty_like(gate.a, at::kMeta).is_contiguous();
}

// a, or a contiguous copy where a packed tensor has no line_pitch, so that its halves can go line by line.
Tensor with_lines(const Tensor& a, const OptionalTensor& b) { return b || line_pitch(a) ? a : a.contiguous(); }

}  // namespace

Tensor leaf_glu_forward(Run run, const Tensor& a, const OptionalTensor& b, const Tensor& p1, const OptionalTensor& p2,
                        const Tensor& p3, const OptionalTensor& p4) {
  const ParameterList parameters = {p1, p2, p3, p4};
  const Gate gate = gate_of(with_lines(a, b), b);
  check_gate(gate, parameters);
  const bool lines = goes_by_lines(gate);
  Tensor source = gate.a;
  const Tensor y = lines ? at::empty(gate.a.sizes(), gate.a.options()) : result_like(gate.a, source);
  if (y.numel() == 0) return y;
  Pass pass(Operation::glu_forward, source, parameters, lines);
  pass.add_input(gate.b);
  pass.add_output(y);
  pass.run(run);
  return y;
}

SixTensors leaf_glu_backward(Run run, const Tensor& grad, const Tensor& a, const OptionalTensor& b, const Tensor& p1,
                             const OptionalTensor& p2, const Tensor& p3, const OptionalTensor& p4,
                             std::array<bool, 6> mask) {
  const ParameterList parameters = {p1, p2, p3, p4};
  const std::array<bool, 4> wanted = {mask[2], mask[3], mask[4], mask[5]};
  const Gate gate = gate_of(with_lines(a, b), b);
  check_gate(gate, parameters);
  check_like("leaf_glu_backward: grad", grad, "a", gate.a);
  const bool lines = goes_by_lines(gate);
  Tensor source = gate.a, da, db, packed;
  if (gate.packed) {
    if (mask[0]) {
      packed = at::empty(a.sizes(), a.options());
      const Gate halves = gate_of(packed, std::nullopt);
      da = halves.a;
      db = halves.b;
    }
  } else if (lines) {
    if (mask[0]) da = at::empty(a.sizes(), a.options());
    if (mask[1]) db = at::empty(a.sizes(), a.options());
  } else {
    if (mask[0] || !gate.a.is_non_overlapping_and_dense()) da = result_like(gate.a, source);
    if (mask[1]) db = at::empty_like(source);
  }
  const auto finished = [&](const std::array<Tensor, 4>& dp) {
    if (gate.packed) return SixTensors(packed, Tensor(), dp[0], dp[1], dp[2], dp[3]);
    return SixTensors(mask[0] ? da : Tensor(), db, dp[0], dp[1], dp[2], dp[3]);
  };
  if (source.numel() == 0) return finished(no_sums(parameters, wanted));
  Pass pass(Operation::glu_backward, source, parameters, lines);
  pass.add_input(gate.b);
  pass.add_input(grad);
  pass.add_output(mask[0] ? da : Tensor());
  pass.add_output(db);
  return finished(pass.run_with_sums(run, wanted));
}

namespace {

// ---- meta -----------------------------------------------------------------------------------------------------------

Tensor leaf_glu_forward_meta(const Tensor& a, const OptionalTensor& b, const Tensor& p1, const OptionalTensor& p2,
                             const Tensor& p3, const OptionalTensor& p4) {
  const Gate gate = gate_of(a, b);
  check_gate(gate, {p1, p2, p3, p4});
  return gate.packed ? at::empty_symint(gate.a.sym_sizes(), a.options()) : at::empty_like(a);
}

SixTensors leaf_glu_backward_meta(const Tensor& grad, const Tensor& a, const OptionalTensor& b, const Tensor& p1,
                                  const OptionalTensor& p2, const Tensor& p3, const OptionalTensor& p4,
                                  std::array<bool, 6> mask) {
  const ParameterList parameters = {p1, p2, p3, p4};
  const Gate gate = gate_of(a, b);
  check_gate(gate, parameters);
  check_like("leaf_glu_backward: grad", grad, "a", gate.a);
  const auto dp = sums_meta(parameters, {mask[2], mask[3], mask[4], mask[5]});
  const Tensor da = !mask[0]      ? Tensor()
                    : gate.packed ? at::empty_symint(a.sym_sizes(), a.options())
                                  : at::empty_like(a);
  return {da, mask[1] && b ? at::empty_like(a) : Tensor(), dp[0], dp[1], dp[2], dp[3]};
}

// ---- gradients ------------------------------------------------------------------------------------------------------

constexpr Dispatched<leaf_glu_forward> call_forward{kGluForward};
constexpr Dispatched<leaf_glu_backward> call_backward{kGluBackward};

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LeafGluNode : torch::autograd::Function<LeafGluNode> {
  static Tensor forward(AutogradContext* context, const Tensor& a, const OptionalTensor& b, const Tensor& p1,
                        const OptionalTensor& p2, const Tensor& p3, const OptionalTensor& p4) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({a, b.value_or(Tensor()), p1, p2.value_or(Tensor()), p3, p4.value_or(Tensor())});
    context->set_materialize_grads(false);
    return call_forward(a, b, p1, p2, p3, p4);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(6);
    const auto saved = context->get_saved_variables();
    const auto [da, db, dp1, dp2, dp3, dp4] =
        call_backward(grads[0], saved[0], optional(saved[1]), saved[2], optional(saved[3]), saved[4],
                      optional(saved[5]), needed<6>(*context, saved));
    return {da, db, dp1, dp2, dp3, dp4};
  }
};

Tensor leaf_glu_forward_autograd(const Tensor& a, const OptionalTensor& b, const Tensor& p1, const OptionalTensor& p2,
                                 const Tensor& p3, const OptionalTensor& p4) {
  const ParameterList parameters = {p1, p2, p3, p4};
  check_layout(a, parameters, kGluNames);
  check_layout("leaf_glu", "b", b);
  const bool differentiable = any_requires_grad(a, b, p1, p2, p3, p4);
  if (any_tangent(a, b, p1, p2, p3, p4) || (differentiable && inside_functorch())) {
    const Gate gate = gate_of(a, b);
    check_gate(gate, parameters);
    return Composite(gate.a, parameters).glu_forward(gate.b);
  }
  if (differentiable) return LeafGluNode::apply(a, b, p1, p2, p3, p4);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_forward(a, b, p1, p2, p3, p4);
}

// Where it is itself differentiated, it runs as tensor operations.
SixTensors leaf_glu_backward_autograd(const Tensor& grad, const Tensor& a, const OptionalTensor& b, const Tensor& p1,
                                      const OptionalTensor& p2, const Tensor& p3, const OptionalTensor& p4,
                                      std::array<bool, 6> mask) {
  const ParameterList parameters = {p1, p2, p3, p4};
  check_layout(a, parameters, kGluNames);
  check_layout("leaf_glu", "b", b);
  check_layout("leaf_glu_backward", "grad", grad);
  if (any_tangent(grad, a, b, p1, p2, p3, p4) || any_requires_grad(grad, a, b, p1, p2, p3, p4)) {
    const Gate gate = gate_of(a, b);
    check_gate(gate, parameters);
    check_like("leaf_glu_backward: grad", grad, "a", gate.a);
    if (gate.packed) mask[1] = mask[0];
    const auto [da, db, dp1, dp2, dp3, dp4] = Composite(gate.a, parameters).glu_backward(grad, gate.b, mask);
    if (!gate.packed) return {da, db, dp1, dp2, dp3, dp4};
    return {mask[0] ? at::cat({da, db}, -1) : Tensor(), Tensor(), dp1, dp2, dp3, dp4};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_backward(grad, a, b, p1, p2, p3, p4, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(leaf_cuda, Meta, library) {
  if (!is_unregistered(c10::DispatchKey::Meta, kGluForward)) return;
  library.impl("leaf_glu_forward", leaf_glu_forward_meta);
  library.impl("leaf_glu_backward", leaf_glu_backward_meta);
}

TORCH_LIBRARY_IMPL(leaf_cuda, Autograd, library) {
  if (!is_unregistered(c10::DispatchKey::Autograd, kGluForward)) return;
  library.impl("leaf_glu_forward", leaf_glu_forward_autograd);
  library.impl("leaf_glu_backward", leaf_glu_backward_autograd);
}

}  // namespace leaf_cuda
