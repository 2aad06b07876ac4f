#include "recurrent_layer.h"

#include "leaf_checks.h"

namespace leaf_cuda {
namespace {

void check_tensor(const std::string& name, const Tensor& t, const Tensor& x, c10::SymIntArrayRef sizes) {
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), name, " has dtype ", dtype_name(t.scalar_type()),
                   "; it takes that of x, ", dtype_name(x.scalar_type()));
  TORCH_CHECK_VALUE(t.device() == x.device(), name, " is on ", t.device(), ", but x is on ", x.device());
  TORCH_CHECK_VALUE(t.sym_sizes() == sizes, name, " has shape ", t.sym_sizes(), "; it takes ", sizes);
}

}  // namespace

void check_layer(const Layer& l) {
  const Cell& cell = l.cell();
  const std::string function = cell.function;
  const Names names = {cell.function, "x"};
  const Tensor &x = l.x, &h = l.h;
  check_dtype(x, names);
  TORCH_CHECK_VALUE(h.dim() == 2, function, ": h has shape ", h.sym_sizes(), "; it takes (batch, hidden)");
  const c10::SymInt hidden = h.sym_size(1), columns = cell.gates * hidden;
  TORCH_CHECK_VALUE(x.dim() == (l.batch_sizes ? 2 : 3), function, ": x has shape ", x.sym_sizes(), "; it takes (",
                    l.batch_sizes ? "rows" : "steps, batch", ", features)");
  if (l.batch_sizes) {
    const Tensor& sizes = *l.batch_sizes;
    TORCH_CHECK_TYPE(
        sizes.scalar_type() == at::kLong && sizes.dim() == 1 && (sizes.is_cpu() || (sizes.is_meta() && x.is_meta())),
        function, ": batch_sizes is of dtype ", dtype_name(sizes.scalar_type()), " and shape ", sizes.sym_sizes(),
        " on ", sizes.device(), "; it takes torch.int64 and (steps) on cpu");
  } else {
    TORCH_CHECK_VALUE(x.sym_size(0).sym_gt(0).guard_bool(__FILE__, __LINE__), function, ": x has shape ", x.sym_sizes(),
                      "; it takes one step or more");
    TORCH_CHECK_VALUE(x.sym_size(1).sym_eq(h.sym_size(0)).guard_bool(__FILE__, __LINE__), function, ": h has shape ",
                      h.sym_sizes(), ", but x, (steps, batch, features), has ", x.sym_sizes());
  }
  check_tensor(function + ": h", h, x, h.sym_sizes());
  if (l.c) check_tensor(function + ": c", *l.c, x, h.sym_sizes());
  check_tensor(function + ": weight_ih", l.weight_ih, x, {columns, x.sym_size(-1)});
  check_tensor(function + ": weight_hh", l.weight_hh, x, {columns, hidden});
  if (l.bias_ih) check_tensor(function + ": bias_ih", *l.bias_ih, x, {columns});
  if (l.bias_hh) check_tensor(function + ": bias_hh", *l.bias_hh, x, {columns});
  for (int q = 0; q < 4; ++q) {
    const Tensor& p = *l.parameters[q];
    check_parameter_type(names, kNames[q], p, *l.parameters[0], x);
    const bool fits =
        p.dim() == 2 && p.sym_size(0) == cell.sets &&
        (TORCH_GUARD_OR_FALSE(p.sym_size(1).sym_eq(1)) || p.sym_size(1).sym_eq(hidden).guard_bool(__FILE__, __LINE__));
    TORCH_CHECK_VALUE(fits, function, ": ", kNames[q], " has shape ", p.sym_sizes(), "; it takes (", cell.sets,
                      ", 1) or (", cell.sets, ", ", hidden, "), a row for each LEAF");
  }
}

void check_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                    const Tensor& output, const Tensor& cells, const Tensor& pre, const Layer& l) {
  check_layer(l);
  const std::string function = std::string(l.cell().function) + " backward: ";
  c10::SymDimVector sizes(l.x.sym_sizes().begin(), l.x.sym_sizes().end());
  sizes.back() = l.h.sym_size(1);
  check_tensor(function + "output", output, l.x, sizes);
  if (l.c) check_tensor(function + "cells", cells, l.x, sizes);
  if (grad_output) check_tensor(function + "grad_output", *grad_output, l.x, sizes);
  if (grad_h_n) check_tensor(function + "grad_h_n", *grad_h_n, l.x, l.h.sym_sizes());
  TORCH_CHECK_VALUE(l.c || !grad_c_n, function, "grad_c_n is a tensor; without c it takes None");
  if (grad_c_n) check_tensor(function + "grad_c_n", *grad_c_n, l.x, l.h.sym_sizes());
  sizes.back() = 4 * l.h.sym_size(1);
  check_tensor(function + "pre", pre, l.x, sizes);
}

void check_layouts(const Layer& l) {
  const char* const function = l.cell().function;
  check_layout(l.x, l.parameters, {function, "x"});
  check_layout(function, "h", l.h);
  check_layout(function, "c", l.c);
  check_layout(function, "weight_ih", l.weight_ih);
  check_layout(function, "weight_hh", l.weight_hh);
  check_layout(function, "bias_ih", l.bias_ih);
  check_layout(function, "bias_hh", l.bias_hh);
  check_layout(function, "batch_sizes", l.batch_sizes);
}

}  // namespace leaf_cuda
