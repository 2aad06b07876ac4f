// Recurrent layers, LSTM and GRU with LEAF in the place of their sigmoids and tanhs: operators, and their gradients.
//
// The pre-activations' part by x is one product for all steps. Then a layer goes through the sequence step by step: the
// product of the state and the recurrent weights is added to the step's rows, and one fused pass (leaf_operations.h)
// makes the next state of them.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>

#include "leaf_checks.h"
#include "leaf_composite.h"
#include "products.h"

namespace leaf_cuda {
namespace {

// What sets LSTM and GRU apart. A row of pre-activations has four columns of `hidden` elements each; weights have so
// many as they have gates.
struct Cell {
  const char* function;
  Operation forward, backward;
  int sets;       // of parameters
  int column[4];  // of the operation's inputs 0 ... 3
  int gates;
  int recurrent;  // the first column that h has a part in
  bool has_cell_state;
};
constexpr Cell kLstm = {"leaf_lstm", Operation::lstm_forward, Operation::lstm_backward, 5, {0, 1, 2, 3}, 4, 0, true};
// x's part is (r, z, n), h's (r, z, m), the row (n, r, z, m): so h's has its place in one piece, in the order of its
// weights.
constexpr Cell kGru = {"leaf_gru", Operation::gru_forward, Operation::gru_backward, 3, {1, 2, 0, 3}, 3, 1, false};

const Cell& cell_of(const OptionalTensor& c) { return c ? kLstm : kGru; }

// ---- checks ---------------------------------------------------------------------------------------------------------

// The layer's tensors, in the operators' order.
struct Layer {
  const Tensor &x, &h;
  const OptionalTensor& c;
  const Tensor &weight_ih, &weight_hh;
  const OptionalTensor &bias_ih, &bias_hh;
  const ParameterList& parameters;
  const OptionalTensor& batch_sizes;
  bool reverse;

  const Cell& cell() const { return cell_of(c); }
};

void check_tensor(const std::string& name, const Tensor& t, const Tensor& x, c10::SymIntArrayRef sizes) {
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), name, " has dtype ", t.scalar_type(), "; it takes that of x, ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(t.device() == x.device(), name, " is on ", t.device(), ", but x is on ", x.device());
  TORCH_CHECK_VALUE(t.sym_sizes() == sizes, name, " has shape ", t.sym_sizes(), "; it takes ", sizes);
}

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
        function, ": batch_sizes is of dtype ", sizes.scalar_type(), " and shape ", sizes.sym_sizes(), " on ",
        sizes.device(), "; it takes Long and (steps) on cpu");
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

// Of what the forward operator gave, and the gradients of it.
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

// ---- steps ----------------------------------------------------------------------------------------------------------

// A sequence's steps: step t has the rows first[t] ... first[t] + size[t], those of the first size[t] sequences.
struct Steps {
  std::vector<int64_t> first, size;
  bool reverse;

  explicit Steps(const Layer& l) : reverse(l.reverse) {
    if (l.batch_sizes) {
      const Tensor sizes = l.batch_sizes->contiguous();
      size.assign(sizes.const_data_ptr<int64_t>(), sizes.const_data_ptr<int64_t>() + sizes.numel());
      int64_t rows = 0, batch = l.h.size(0), before = batch;
      bool sorted = !size.empty() && size[0] == batch;
      for (const int64_t n : size) {
        sorted = sorted && n > 0 && n <= before;
        rows += before = n;
      }
      TORCH_CHECK_VALUE(sorted && rows == l.x.size(0), l.cell().function, ": batch_sizes is ", at::IntArrayRef(size),
                        "; it takes sizes that never grow, from h's batch, ", batch,
                        ", on, and add up to the rows of x, ", l.x.size(0));
    } else {
      size.assign(l.x.size(0), l.x.size(1));
    }
    for (int64_t row = 0; const int64_t n : size) {
      first.push_back(row);
      row += n;
    }
  }

  int64_t count() const { return static_cast<int64_t>(size.size()); }
  // The k-th step that is taken.
  int64_t at(int64_t k) const { return reverse ? count() - 1 - k : k; }

  Tensor rows(const Tensor& t, int64_t step) const { return t.narrow(0, first[step], size[step]); }

  // The parts, by rows, of the state before a step: of the step taken before, state_of(step), and of the initial one.
  template <class F>
  std::vector<Tensor> previous(int64_t step, const Tensor& initial, F state_of) const {
    const int64_t before = reverse ? step + 1 : step - 1, n = size[step];
    if (before < 0 || before == count()) return {initial.narrow(0, 0, n)};
    const Tensor state = state_of(before);
    if (size[before] >= n) return {state.narrow(0, 0, n)};
    return {state, initial.narrow(0, size[before], n - size[before])};
  }

  // The state after each sequence's last step.
  template <class F>
  Tensor last(F state_of) const {
    if (reverse) return state_of(0);
    std::vector<Tensor> parts;
    for (int64_t step = count() - 1, done = 0; step >= 0; done = size[step--])
      if (size[step] > done || step == 0) parts.push_back(state_of(step).narrow(0, done, size[step] - done));
    return at::cat(parts);
  }
};

Tensor joined(const std::vector<Tensor>& parts) { return parts.size() == 1 ? parts[0] : at::cat(parts); }

// ---- the fused passes -----------------------------------------------------------------------------------------------

// One step's pass, again and again with other rows: matrices of `hidden` columns, or columns of wider ones.
class StepPass {
 public:
  StepPass(const Cell& cell, Operation operation, const Tensor& h, const ParameterList& parameters)
      : cell_(cell), like_(h), hidden_(h.size(1)), bytes_(hidden_ * h.element_size()) {
    args_.operation = operation;
    args_.dtype = h.scalar_type();
    args_.run = hidden_;
    args_.parameters.dtype = parameters[0]->scalar_type();
    args_.parameters.matrix = {1, hidden_};
    for (int q = 0; q < 4; ++q) {
      parameters_[q] = parameters[q]->contiguous();
      const Tensor& p = parameters_[q];
      for (int set = 0; set < cell.sets; ++set) {
        args_.parameters.p[4 * set + q] =
            static_cast<const char*>(p.const_data_ptr()) + set * p.size(1) * p.element_size();
        args_.parameters.strides[4 * set + q] = {0, p.size(1) == 1 ? 0 : 1};
      }
    }
  }

  void set_input(int k, const Tensor& rows, int column = 0) {
    args_.in[k] = static_cast<const char*>(rows.const_data_ptr()) + column * bytes_;
    args_.in_stride[k] = 1;
    args_.in_pitch[k] = rows.stride(0);
  }
  void set_output(int k, const Tensor& rows, int column = 0) {
    args_.out[k] = static_cast<char*>(rows.mutable_data_ptr()) + column * bytes_;
    args_.out_pitch[k] = rows.stride(0);
  }
  // The four columns of pre-activations, or of their gradients.
  void set_gate_inputs(const Tensor& rows) {
    for (int k = 0; k < 4; ++k) set_input(k, rows, cell_.column[k]);
  }
  void set_gate_outputs(const Tensor& rows) {
    for (int k = 0; k < 4; ++k) set_output(k, rows, cell_.column[k]);
  }
  // sums: (4, sets, hidden), contiguous.
  void set_sums(const Tensor& sums) {
    args_.dp_dtype = sums.scalar_type();
    for (int q = 0; q < 4; ++q)
      for (int set = 0; set < cell_.sets; ++set) {
        args_.dp[4 * set + q] =
            static_cast<char*>(sums.mutable_data_ptr()) + (q * cell_.sets + set) * hidden_ * sums.element_size();
        args_.dp_strides[4 * set + q] = {0, 1};
      }
  }

  void run(Run by, int64_t rows) {
    args_.plan = {rows, hidden_, 1};
    args_.workspace = workspace_limit(rows * hidden_, like_.element_size());
    if (rows * hidden_ > 0) by(args_, like_);
  }

 private:
  const Cell& cell_;
  const Tensor& like_;
  int64_t hidden_, bytes_;
  std::array<Tensor, 4> parameters_;
  Args args_{};
};

Tensor by_rows(const Tensor& t) { return t.contiguous().flatten(0, -2); }

at::DimVector sizes_with(const Tensor& t, int64_t last) {
  at::DimVector sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = last;
  return sizes;
}

// Of a row's pre-activations the columns that h has a part in.
Tensor part_of_h(const Cell& cell, const Tensor& rows, const Tensor& weight_hh) {
  return rows.narrow(1, cell.recurrent * weight_hh.size(1), weight_hh.size(0));
}

// All rows of pre-activations, (rows, 4·hidden), less the product of h and its weights.
Tensor part_by_x(const Layer& l) {
  const int64_t hidden = l.h.size(1);
  const Tensor rows = by_rows(l.x);
  const Product by_weight(l.weight_ih, rows.size(0), 1);
  const Tensor bias_ih = l.bias_ih.value_or(Tensor()), bias_hh = l.bias_hh.value_or(Tensor());
  if (l.c)
    return by_weight.times(rows, bias_ih.defined() && bias_hh.defined() ? bias_ih + bias_hh
                                 : bias_ih.defined()                    ? bias_ih
                                                                        : bias_hh);
  const Tensor by_x = by_weight.times(rows, bias_ih), pre = at::empty({rows.size(0), 4 * hidden}, by_x.options());
  pre.narrow(1, 0, hidden).copy_(by_x.narrow(1, 2 * hidden, hidden));
  pre.narrow(1, hidden, 2 * hidden).copy_(by_x.narrow(1, 0, 2 * hidden));
  pre.narrow(1, 3 * hidden, hidden).zero_();
  if (bias_hh.defined()) pre.narrow(1, hidden, 3 * hidden).add_(bias_hh);
  return pre;
}

// Sums of so many steps are kept until they are added up. Steps are counted down, so that all but the first lot fill
// every place.
constexpr int64_t kStepsOfSums = 64;

// No autocast of the products: the operators' tensors have one dtype.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

}  // namespace

FiveTensors leaf_recurrent_forward(Run run, const Tensor& x, const Tensor& h, const OptionalTensor& c,
                                   const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                   const OptionalTensor& bias_hh, const Tensor& p1, const Tensor& p2, const Tensor& p3,
                                   const Tensor& p4, const OptionalTensor& batch_sizes, bool reverse) {
  const ParameterList parameters = {p1, p2, p3, p4};
  const Layer layer{x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, parameters, batch_sizes, reverse};
  check_layer(layer);
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  const Cell& cell = layer.cell();
  const Steps steps(layer);
  const int64_t hidden = h.size(1);
  const Tensor h0 = h.contiguous(), c0 = c ? c->contiguous() : Tensor();
  const Tensor output = at::empty(sizes_with(x, hidden), x.options());
  const Tensor cells = at::empty(c ? sizes_with(x, hidden) : at::DimVector{0}, x.options());
  const Tensor output_rows = by_rows(output), cell_rows = c ? by_rows(cells) : Tensor();
  const Tensor pre_rows = part_by_x(layer);
  const Product by_weight(weight_hh, h.size(0), steps.count());
  StepPass pass(cell, cell.forward, h0, parameters);
  for (int64_t k = 0; k < steps.count(); ++k) {
    const int64_t step = steps.at(k);
    const auto before = [&](const Tensor& initial, const Tensor& all) {
      return joined(steps.previous(step, initial, [&](int64_t s) { return steps.rows(all, s); }));
    };
    const Tensor rows = steps.rows(pre_rows, step), sum = part_of_h(cell, rows, weight_hh);
    const Tensor state = before(h0, output_rows);
    by_weight(sum, sum, state);
    pass.set_gate_inputs(rows);
    const Tensor cell_state = c ? before(c0, cell_rows) : state;
    pass.set_input(4, cell_state);
    pass.set_output(0, steps.rows(output_rows, step));
    if (c) pass.set_output(1, steps.rows(cell_rows, step));
    pass.run(run, rows.size(0));
  }
  const auto last = [&](const Tensor& all) {
    const Tensor state = steps.last([&](int64_t s) { return steps.rows(all, s); });
    return state.is_alias_of(all) ? state.clone() : state;
  };
  const Tensor pre = pre_rows.view(sizes_with(x, 4 * hidden));
  return {output, last(output_rows), c ? last(cell_rows) : at::empty({0}, x.options()), cells, pre};
}

ElevenTensors leaf_recurrent_backward(Run run, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                      const OptionalTensor& grad_c_n, const Tensor& output, const Tensor& cells,
                                      const Tensor& pre, const Tensor& x, const Tensor& h, const OptionalTensor& c,
                                      const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                      const OptionalTensor& bias_hh, const Tensor& p1, const Tensor& p2,
                                      const Tensor& p3, const Tensor& p4, const OptionalTensor& batch_sizes,
                                      bool reverse, std::array<bool, 11> mask) {
  const ParameterList parameters = {p1, p2, p3, p4};
  const Layer layer{x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, parameters, batch_sizes, reverse};
  check_backward(grad_output, grad_h_n, grad_c_n, output, cells, pre, layer);
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  const Cell& cell = layer.cell();
  const Steps steps(layer);
  const int64_t hidden = h.size(1);
  const auto options = x.options();
  const Tensor h0 = h.contiguous(), c0 = c ? c->contiguous() : Tensor();
  const Tensor pre_rows = by_rows(pre), output_rows = by_rows(output), cell_rows = c ? by_rows(cells) : Tensor();
  const Tensor grad_rows = grad_output ? by_rows(*grad_output) : Tensor();
  // The gradients of the states between the steps.
  const auto begin = [&](const OptionalTensor& grad) {
    return grad ? grad->clone(at::MemoryFormat::Contiguous) : at::zeros(h.sizes(), options);
  };
  const Tensor dh = begin(grad_h_n), dc = c ? begin(grad_c_n) : Tensor();
  const Tensor dpre = at::empty(pre_rows.sizes(), options);
  const bool sums_wanted = mask[7] || mask[8] || mask[9] || mask[10];
  const int64_t kept = std::min(steps.count(), kStepsOfSums);
  const Tensor sums = sums_wanted
                          ? at::zeros({kept, 4, cell.sets, hidden}, options.dtype(at::toOpMathType(x.scalar_type())))
                          : Tensor();
  Tensor total;

  const Product by_weight(weight_hh.t(), h.size(0), steps.count());
  StepPass pass(cell, cell.backward, h0, parameters);
  const auto before = [&](int64_t step, const Tensor& initial, const Tensor& all) {
    return steps.previous(step, initial, [&](int64_t s) { return steps.rows(all, s); });
  };
  for (int64_t k = steps.count() - 1; k >= 0; --k) {
    const int64_t step = steps.at(k), n = steps.size[step];
    const Tensor dstate = dh.narrow(0, 0, n);
    if (grad_output) dstate.add_(steps.rows(grad_rows, step));
    const Tensor state = joined(before(step, c ? c0 : h0, c ? cell_rows : output_rows));
    const Tensor drows = steps.rows(dpre, step);
    pass.set_gate_inputs(steps.rows(pre_rows, step));
    pass.set_input(4, state);
    pass.set_input(5, dstate);
    pass.set_gate_outputs(drows);
    pass.set_output(4, c ? dc : dstate);
    if (c) pass.set_input(6, dc);
    if (sums_wanted) pass.set_sums(sums[k % kept]);
    pass.run(run, n);
    by_weight(dstate, c ? Tensor() : dstate, part_of_h(cell, drows, weight_hh));
    if (sums_wanted && k % kept == 0) {
      const Tensor of_steps = sums.sum(0);
      total = total.defined() ? total.add_(of_steps) : of_steps;
    }
  }

  // The gradients of x's part and of h's, and of the weights by a transposed product, which oneDNN takes better.
  const Tensor of_h = part_of_h(cell, dpre, weight_hh);
  const Tensor of_x = c ? dpre : at::cat({dpre.narrow(1, hidden, 2 * hidden), dpre.narrow(1, 0, hidden)}, 1);
  const auto of_weight = [&](const Tensor& dgates, const Tensor& inputs) {
    return Product(dgates.t(), inputs.size(1), 1).times(inputs.t()).t().contiguous();
  };
  Tensor dx, dweight_ih, dweight_hh, dbias_ih, dbias_hh;
  if (mask[0]) dx = Product(weight_ih.t(), of_x.size(0), 1).times(of_x).view(x.sizes());
  if (mask[3]) dweight_ih = of_weight(of_x, by_rows(x));
  if (mask[4]) {
    std::vector<Tensor> states;
    for (int64_t step = 0; step < steps.count(); ++step)
      for (const Tensor& part : before(step, h0, output_rows)) states.push_back(part);
    dweight_hh = of_weight(of_h, at::cat(states));
  }
  if (mask[5] && bias_ih) dbias_ih = of_x.sum(0);
  if (mask[6] && bias_hh) dbias_hh = c && dbias_ih.defined() ? dbias_ih.clone() : of_h.sum(0);
  std::array<Tensor, 4> dp;
  for (int q = 0; q < 4; ++q) {
    if (!mask[7 + q]) continue;
    const Tensor& p = *parameters[q];
    dp[q] = (p.size(1) == 1 ? total[q].sum(1, /*keepdim=*/true) : total[q]).to(p.scalar_type());
    if (dp[q].is_alias_of(total)) dp[q] = dp[q].clone();
  }
  return {dx,
          mask[1] ? dh : Tensor(),
          mask[2] ? dc : Tensor(),
          dweight_ih,
          dweight_hh,
          dbias_ih,
          dbias_hh,
          dp[0],
          dp[1],
          dp[2],
          dp[3]};
}

namespace {

// ---- as tensor operations -------------------------------------------------------------------------------------------

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
  const Tensor by_x = at::linear(l.x.reshape({-1, l.x.size(-1)}), l.weight_ih, l.bias_ih);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t step = steps.at(k);
    const auto before = [&](const Tensor& initial, const std::vector<Tensor>& all) {
      return joined(steps.previous(step, initial, [&](int64_t s) { return all[s]; }));
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
      LstmForward::apply<TensorMath>(in, p, out, static_cast<Tensor*>(nullptr));
      cells[step] = out[1].to(dtype);
    } else {
      GruForward::apply<TensorMath>(in, p, out, static_cast<Tensor*>(nullptr));
    }
    outputs[step] = out[0].to(dtype);
  }
  const auto all = [&](const std::vector<Tensor>& parts) {
    return at::cat(parts).view(sizes_with(l.x, parts[0].size(1)));
  };
  const auto last = [&](const std::vector<Tensor>& parts) { return steps.last([&](int64_t s) { return parts[s]; }); };
  const Tensor none = at::empty({0}, l.x.options());
  return {all(outputs), last(outputs), l.c ? last(cells) : none, l.c ? all(cells) : none, all(pre)};
}

// ---- meta -----------------------------------------------------------------------------------------------------------

Tensor rows_like(const Tensor& t, const c10::SymInt& columns) {
  c10::SymDimVector sizes(t.sym_sizes().begin(), t.sym_sizes().end());
  sizes.back() = columns;
  return at::empty_symint(sizes, t.options());
}

Tensor new_like(bool wanted, const OptionalTensor& t) {
  return wanted && t ? at::empty_symint(t->sym_sizes(), t->options()) : Tensor();
}

FiveTensors forward_meta(const Tensor& x, const Tensor& h, const OptionalTensor& c, const Tensor& weight_ih,
                         const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                         const Tensor& p1, const Tensor& p2, const Tensor& p3, const Tensor& p4,
                         const OptionalTensor& batch_sizes, bool reverse) {
  const ParameterList parameters = {p1, p2, p3, p4};
  check_layer({x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, parameters, batch_sizes, reverse});
  const c10::SymInt hidden = h.sym_size(1);
  const auto none = [&] { return at::empty({0}, x.options()); };
  return {rows_like(x, hidden), new_like(true, h), c ? new_like(true, h) : none(), c ? rows_like(x, hidden) : none(),
          rows_like(x, 4 * hidden)};
}

ElevenTensors backward_meta(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                            const OptionalTensor& grad_c_n, const Tensor& output, const Tensor& cells,
                            const Tensor& pre, const Tensor& x, const Tensor& h, const OptionalTensor& c,
                            const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                            const OptionalTensor& bias_hh, const Tensor& p1, const Tensor& p2, const Tensor& p3,
                            const Tensor& p4, const OptionalTensor& batch_sizes, bool reverse,
                            std::array<bool, 11> mask) {
  const ParameterList parameters = {p1, p2, p3, p4};
  check_backward(grad_output, grad_h_n, grad_c_n, output, cells, pre,
                 {x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, parameters, batch_sizes, reverse});
  const auto dp = sums_meta(parameters, {mask[7], mask[8], mask[9], mask[10]});
  return {new_like(mask[0], x),
          new_like(mask[1], h),
          new_like(mask[2], c),
          new_like(mask[3], weight_ih),
          new_like(mask[4], weight_hh),
          new_like(mask[5], bias_ih),
          new_like(mask[6], bias_hh),
          dp[0],
          dp[1],
          dp[2],
          dp[3]};
}

// ---- gradients ------------------------------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

FiveTensors call_forward(const Tensor& x, const Tensor& h, const OptionalTensor& c, const Tensor& weight_ih,
                         const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                         const Tensor& p1, const Tensor& p2, const Tensor& p3, const Tensor& p4,
                         const OptionalTensor& batch_sizes, bool reverse) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(kRecurrentForward, "").typed<decltype(call_forward)>();
  return op.call(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, p1, p2, p3, p4, batch_sizes, reverse);
}

ElevenTensors call_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                            const OptionalTensor& grad_c_n, const Tensor& output, const Tensor& cells,
                            const Tensor& pre, const Tensor& x, const Tensor& h, const OptionalTensor& c,
                            const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                            const OptionalTensor& bias_hh, const Tensor& p1, const Tensor& p2, const Tensor& p3,
                            const Tensor& p4, const OptionalTensor& batch_sizes, bool reverse,
                            std::array<bool, 11> mask) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(kRecurrentBackward, "").typed<decltype(call_backward)>();
  return op.call(grad_output, grad_h_n, grad_c_n, output, cells, pre, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh,
                 p1, p2, p3, p4, batch_sizes, reverse, mask);
}

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

  // For gradients of gradients: the layer once more, as tensor operations, and the gradients by autograd.
  static void differentiable_backward(const variable_list& grads, const variable_list& s, bool reverse,
                                      const std::array<bool, 11>& mask, variable_list& results) {
    const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
    // Each its own node, so that a tensor that stands for two inputs has the gradient of each.
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

TORCH_LIBRARY_IMPL(leaf_cuda, Meta, library) {
  if (!is_unregistered(c10::DispatchKey::Meta, kRecurrentForward)) return;
  library.impl("leaf_recurrent_forward", forward_meta);
  library.impl("leaf_recurrent_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(leaf_cuda, Autograd, library) {
  if (!is_unregistered(c10::DispatchKey::Autograd, kRecurrentForward)) return;
  library.impl("leaf_recurrent_forward", forward_autograd);
  library.impl("leaf_recurrent_backward", backward_autograd);
}

}  // namespace leaf_cuda
