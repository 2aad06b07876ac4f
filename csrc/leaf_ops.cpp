#include "leaf_ops.h"

#include <ATen/OpMathType.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "broadcast.h"
#include "leaf_checks.h"

namespace leaf_cuda {
namespace {

// ---- execution ------------------------------------------------------------------------------------------------------

// A tensor like u for a result, and the tensor to read u from: u itself, or the result filled with u where u has gaps
// or overlaps.
Tensor result_like(const Tensor& u, Tensor& source) {
  Tensor result = at::empty_like(u);
  source = u.is_non_overlapping_and_dense() ? u : result.copy_(u);
  return result;
}

bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

bool is_one_element(const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1 && t.stride(d) != 0) return false;
  return true;
}

Broadcast make_broadcast(const Tensor& u, at::ArrayRef<OptionalTensor> parameters) {
  c10::SmallVector<Tensor, kMaxParameters> given;
  for (const OptionalTensor& p : parameters)
    if (p) given.push_back(*p);
  return Broadcast(u, given);
}

// One pass over a dense u: its plan and arguments, and what must live until it has run.
class Pass {
 public:
  // parameters: one set or more; the first's are those that gradients are of.
  Pass(Operation operation, const Tensor& u, at::ArrayRef<OptionalTensor> parameters)
      : broadcast_(make_broadcast(u, parameters)), u_(u) {
    args_.operation = operation;
    args_.plan = broadcast_.plan();
    args_.dtype = u.scalar_type();
    args_.parameters.dtype = parameters[0]->scalar_type();
    for (size_t q = 0; q < parameters.size(); ++q) {
      if (q < 4) own_[q] = parameters[q];
      if (!parameters[q]) continue;
      flat_[q] = broadcast_.flatten(*parameters[q]);
      args_.parameters.p[q] = flat_[q].const_data_ptr();
      args_.parameters.stride[q] = flat_[q].numel() == 1 ? 0 : 1;
    }
    args_.in[0] = u.const_data_ptr();
    args_.in_stride[0] = 1;
  }

  // t has u's shape, in any layout. In the order of the operation, behind u.
  void add_input(const Tensor& t) {
    const bool one = is_one_element(t);
    inputs_[next_input_] = one || same_layout(t, u_) ? t : at::empty_like(u_).copy_(t);
    args_.in[next_input_] = inputs_[next_input_].const_data_ptr();
    args_.in_stride[next_input_++] = one ? 0 : 1;
  }

  // t has u's layout, or is undefined where it is not wanted. It may be u.
  void add_output(const Tensor& t) { args_.out[next_output_++] = t.defined() ? t.mutable_data_ptr() : nullptr; }

  void run(Run by) { by(args_, u_); }

  // The gradients of the first set's parameters, those that are wanted and there.
  std::array<Tensor, 4> run_with_sums(Run by, std::array<bool, 4> wanted) {
    // Where every gradient has its parameter's own shape, the loops write it; else it is summed to that shape from
    // `count` values in the arithmetic dtype.
    bool flat = true;
    for (int q = 0; q < 4; ++q) {
      wanted[q] = wanted[q] && own_[q];
      flat = flat && (!wanted[q] || broadcast_.is_flat(*own_[q]));
    }
    args_.dp_dtype = flat ? args_.parameters.dtype : at::toOpMathType(args_.dtype);
    std::array<Tensor, 4> dp;
    for (int q = 0; q < 4; ++q) {
      if (!wanted[q]) continue;
      dp[q] = flat ? at::empty(own_[q]->sizes(), own_[q]->options())
                   : at::empty({args_.plan.count}, u_.options().dtype(args_.dp_dtype));
      args_.dp[q] = dp[q].mutable_data_ptr();
    }
    run(by);
    if (flat) return dp;
    flat_ = {};
    for (int q = 0; q < 4; ++q)
      if (wanted[q]) dp[q] = broadcast_.unflatten(dp[q], *own_[q]);
    return dp;
  }

 private:
  Broadcast broadcast_;
  const Tensor& u_;
  ParameterList own_;
  std::array<Tensor, kMaxParameters> flat_;
  std::array<Tensor, kMaxInputs> inputs_;
  Args args_{};
  int next_input_ = 1, next_output_ = 0;
};

// What `run_with_sums` gives of no elements.
std::array<Tensor, 4> no_sums(const ParameterList& parameters, std::array<bool, 4> wanted) {
  std::array<Tensor, 4> dp;
  for (int q = 0; q < 4; ++q)
    if (wanted[q] && parameters[q]) dp[q] = at::zeros(parameters[q]->sizes(), parameters[q]->options());
  return dp;
}

}  // namespace

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

namespace {

// ---- meta -----------------------------------------------------------------------------------------------------------

std::array<Tensor, 4> sums_meta(const ParameterList& parameters, std::array<bool, 4> wanted) {
  std::array<Tensor, 4> dp;
  for (int q = 0; q < 4; ++q)
    if (wanted[q] && parameters[q]) dp[q] = at::empty_symint(parameters[q]->sym_sizes(), parameters[q]->options());
  return dp;
}

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
  // Any layout is taken as it is: Inductor need not bring tensors into the one that they have in eager.
  const std::vector<at::Tag> tags = {at::Tag::flexible_layout, at::Tag::pt2_compliant_tag};
  library.def("leaf_forward(Tensor u, Tensor p1, Tensor? p2, Tensor p3, Tensor? p4) -> Tensor", tags);
  library.def(
      "leaf_backward(Tensor grad, Tensor u, Tensor p1, Tensor? p2, Tensor p3, Tensor? p4, bool[5] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  // The gradients of leaf_backward's tensors: v, v1, ..., v4 are those of its results, du, dp1, ..., dp4; None is 0. p4
  // has none.
  library.def(
      "leaf_double_backward(Tensor? v, Tensor? v1, Tensor? v2, Tensor? v3, Tensor? v4, Tensor grad, Tensor u,"
      " Tensor p1, Tensor? p2, Tensor p3, Tensor? p4, bool[6] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
}

bool is_unregistered(c10::DispatchKey key) {
  const auto op = c10::Dispatcher::singleton().findOp({kForward, ""});
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
