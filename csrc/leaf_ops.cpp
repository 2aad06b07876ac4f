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

// The parameters in the order of a plan, alive as long as their pointers are needed.
struct Operands {
  std::array<Tensor, 4> flat;
  FlatParameters parameters{};

  Operands(const Broadcast& broadcast, const ParameterList& own) {
    parameters.dtype = own[0]->scalar_type();
    for (int q = 0; q < 4; ++q) {
      if (!own[q]) continue;
      flat[q] = broadcast.flatten(*own[q]);
      parameters.p[q] = flat[q].const_data_ptr();
      parameters.stride[q] = flat[q].numel() == 1 ? 0 : 1;
    }
  }
};

Broadcast make_broadcast(const Tensor& u, const ParameterList& parameters) {
  c10::SmallVector<Tensor, 4> given;
  for (const OptionalTensor& p : parameters)
    if (p) given.push_back(*p);
  return Broadcast(u, given);
}

// A tensor like u for the result, and the tensor to read u from: u itself, or the result filled with u where u has gaps
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

}  // namespace

Tensor leaf_forward(const Loops& loops, const Tensor& u, const Tensor& p1, const OptionalTensor& p2, const Tensor& p3,
                    const OptionalTensor& p4) {
  const ParameterList parameters = {p1, p2, p3, p4};
  check(u, parameters);
  Tensor source;
  Tensor y = result_like(u, source);
  if (u.numel() == 0) return y;
  const Broadcast broadcast = make_broadcast(source, parameters);
  const Operands operands(broadcast, parameters);
  loops.forward({broadcast.plan(), operands.parameters, u.scalar_type(), source.const_data_ptr(), y.mutable_data_ptr()},
                u);
  return y;
}

FiveTensors leaf_backward(const Loops& loops, const Tensor& grad, const Tensor& u, const Tensor& p1,
                          const OptionalTensor& p2, const Tensor& p3, const OptionalTensor& p4,
                          std::array<bool, 5> mask) {
  const ParameterList parameters = {p1, p2, p3, p4};
  check(u, parameters);
  check_like("leaf_backward: grad", grad, "u", u);
  Tensor du, source = u;
  if (mask[0] || !u.is_non_overlapping_and_dense()) du = result_like(u, source);
  std::array<Tensor, 4> dp;
  if (u.numel() == 0) {
    for (int q = 0; q < 4; ++q)
      if (mask[q + 1] && parameters[q]) dp[q] = at::zeros(parameters[q]->sizes(), parameters[q]->options());
    return {mask[0] ? du : Tensor(), dp[0], dp[1], dp[2], dp[3]};
  }
  const Broadcast broadcast = make_broadcast(source, parameters);
  std::optional<Operands> operands(std::in_place, broadcast, parameters);
  BackwardArgs args{broadcast.plan(), operands->parameters, u.scalar_type()};
  args.u = source.const_data_ptr();
  args.grad_stride = is_one_element(grad) ? 0 : 1;
  const Tensor dense_grad =
      args.grad_stride == 0 || same_layout(grad, source) ? grad : at::empty_like(source).copy_(grad);
  args.grad = dense_grad.const_data_ptr();
  args.du = mask[0] ? du.mutable_data_ptr() : nullptr;

  // Where every gradient has its parameter's own shape, the loops write it; else it is summed to that shape from
  // `count` values in the arithmetic dtype.
  const auto wanted = [&](int q) { return mask[q + 1] && parameters[q]; };
  bool flat = true;
  for (int q = 0; q < 4; ++q) flat = flat && (!wanted(q) || broadcast.is_flat(*parameters[q]));
  args.dp_dtype = flat ? p1.scalar_type() : at::toOpMathType(u.scalar_type());
  for (int q = 0; q < 4; ++q) {
    if (!wanted(q)) continue;
    dp[q] = flat ? at::empty(parameters[q]->sizes(), parameters[q]->options())
                 : at::empty({broadcast.plan().count}, u.options().dtype(args.dp_dtype));
    args.dp[q] = dp[q].mutable_data_ptr();
  }
  loops.backward(args, u);
  operands.reset();
  if (!flat)
    for (int q = 0; q < 4; ++q)
      if (wanted(q)) dp[q] = broadcast.unflatten(dp[q], *parameters[q]);
  return {mask[0] ? du : Tensor(), dp[0], dp[1], dp[2], dp[3]};
}

namespace {

// ---- meta -----------------------------------------------------------------------------------------------------------

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
  std::array<Tensor, 4> dp;
  for (int q = 0; q < 4; ++q)
    if (mask[q + 1] && parameters[q]) dp[q] = at::empty_symint(parameters[q]->sym_sizes(), parameters[q]->options());
  return {mask[0] ? at::empty_like(u) : Tensor(), dp[0], dp[1], dp[2], dp[3]};
}

}  // namespace

// ---- registration ---------------------------------------------------------------------------------------------------

void define_operators(torch::Library& library) {
  library.def("leaf_forward(Tensor u, Tensor p1, Tensor? p2, Tensor p3, Tensor? p4) -> Tensor");
  library.def(
      "leaf_backward(Tensor grad, Tensor u, Tensor p1, Tensor? p2, Tensor p3, Tensor? p4, bool[5] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The gradients of leaf_backward's tensors: v, v1, ..., v4 are those of its results, du, dp1, ..., dp4; None is 0.
  library.def(
      "leaf_double_backward(Tensor? v, Tensor? v1, Tensor? v2, Tensor? v3, Tensor? v4, Tensor grad, Tensor u,"
      " Tensor p1, Tensor? p2, Tensor p3, Tensor? p4, bool[6] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
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
}

}  // namespace leaf_cuda
