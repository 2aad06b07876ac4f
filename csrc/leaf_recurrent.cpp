// Recurrent layers, LSTM and GRU with LEAF in place of their sigmoids and tanhs: the operators.
//
// What x contributes to the pre-activations is one product for all steps. Then a layer goes through the sequence step
// by step: the product of the state and the recurrent weights is added to the step's rows, and one fused pass
// (leaf_operations.h) computes the next state from them.
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "products.h"
#include "recurrent_layer.h"

namespace leaf_cuda {
namespace {

// The pass of one step, reused for other steps with other rows. Operands are matrices of `hidden` columns, or as many
// columns of wider ones.
class StepPass {
 public:
  StepPass(const Cell& cell, Operation operation, const Tensor& h, const ParameterList& parameters)
      : cell_(cell), like_(h), hidden_(h.size(1)), bytes_(hidden_ * h.element_size()) {
    args_.operation = operation;
    args_.dtype = h.scalar_type();
    args_.line = hidden_;
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

  // From a matrix's first row on, or the one given.
  void set_input(int k, const Tensor& matrix, int64_t row = 0, int column = 0) {
    args_.in[k] = static_cast<const char*>(matrix.const_data_ptr()) + offset(matrix, row, column);
    args_.in_stride[k] = 1;
    args_.in_pitch[k] = matrix.stride(0);
  }
  void set_output(int k, const Tensor& matrix, int64_t row = 0, int column = 0) {
    args_.out[k] = static_cast<char*>(matrix.mutable_data_ptr()) + offset(matrix, row, column);
    args_.out_pitch[k] = matrix.stride(0);
  }
  // The four columns of pre-activations, or of their gradients.
  void set_gate_inputs(const Tensor& matrix, int64_t row) {
    for (int k = 0; k < 4; ++k) set_input(k, matrix, row, cell_.column[k]);
  }
  void set_gate_outputs(const Tensor& matrix, int64_t row) {
    for (int k = 0; k < 4; ++k) set_output(k, matrix, row, cell_.column[k]);
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

  int64_t offset(const Tensor& matrix, int64_t row, int column) const {
    return row * matrix.stride(0) * matrix.element_size() + column * bytes_;
  }
};

Tensor by_rows(const Tensor& t) { return t.contiguous().flatten(0, -2); }

// Of rows of pre-activations, the columns that h contributes to.
Tensor part_of_h(const Cell& cell, const Tensor& rows, const Tensor& weight_hh) {
  return rows.narrow(1, cell.recurrent * weight_hh.size(1), weight_hh.size(0));
}

// All rows of pre-activations, (rows, 4·hidden), without the product of h and its weights.
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

// The sums of up to this many steps are kept before they are added up. Steps are counted down, so that only the first
// batch of them may leave places unused, which are zero; all later ones fill every place.
constexpr int64_t kStepsOfSums = 64;

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
  const Tensor pre_rows = part_by_x(layer), of_h = part_of_h(cell, pre_rows, weight_hh);
  const Product by_weight(weight_hh, h.size(0), steps.count());
  StepPass pass(cell, cell.forward, h0, parameters);
  for (int64_t k = 0; k < steps.count(); ++k) {
    const int64_t step = steps.at(k), row = steps.first[step];
    const auto before = [&](const Tensor& initial, const Tensor& all) {
      return joined(steps.previous(step, initial, [&](int64_t s, int64_t n) { return steps.rows(all, s, n); }));
    };
    const Tensor sum = steps.rows(of_h, step), state = before(h0, output_rows);
    by_weight(sum, sum, state);
    pass.set_gate_inputs(pre_rows, row);
    const Tensor cell_state = c ? before(c0, cell_rows) : state;
    pass.set_input(4, cell_state);
    pass.set_output(0, output_rows, row);
    if (c) pass.set_output(1, cell_rows, row);
    pass.run(run, steps.size[step]);
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
  // The gradients of the states, passed on from step to step.
  const auto begin = [&](const OptionalTensor& grad) {
    return grad ? grad->clone(at::MemoryFormat::Contiguous) : at::zeros(h.sizes(), options);
  };
  const Tensor dh = begin(grad_h_n), dc = c ? begin(grad_c_n) : Tensor();
  // The gradients of the pre-activations, and those of h's part.
  const Tensor dpre = at::empty(pre_rows.sizes(), options), of_h = part_of_h(cell, dpre, weight_hh);
  const bool sums_wanted = mask[7] || mask[8] || mask[9] || mask[10];
  const int64_t kept = std::min(steps.count(), kStepsOfSums);
  const Tensor sums = sums_wanted
                          ? at::zeros({kept, 4, cell.sets, hidden}, options.dtype(at::toOpMathType(x.scalar_type())))
                          : Tensor();
  Tensor total;

  const Product by_weight(weight_hh.t(), h.size(0), steps.count());
  StepPass pass(cell, cell.backward, h0, parameters);
  const auto before = [&](int64_t step, const Tensor& initial, const Tensor& all) {
    return steps.previous(step, initial, [&](int64_t s, int64_t n) { return steps.rows(all, s, n); });
  };
  for (int64_t k = steps.count() - 1; k >= 0; --k) {
    const int64_t step = steps.at(k), row = steps.first[step], n = steps.size[step];
    const Tensor dstate = n == dh.size(0) ? dh : dh.narrow(0, 0, n);
    if (grad_output) dstate.add_(steps.rows(grad_rows, step));
    const Tensor state = joined(before(step, c ? c0 : h0, c ? cell_rows : output_rows));
    pass.set_gate_inputs(pre_rows, row);
    pass.set_input(4, state);
    pass.set_input(5, dstate);
    pass.set_gate_outputs(dpre, row);
    pass.set_output(4, c ? dc : dstate);
    if (c) pass.set_input(6, dc);
    if (sums_wanted) pass.set_sums(sums[k % kept]);
    pass.run(run, n);
    by_weight(dstate, c ? Tensor() : dstate, steps.rows(of_h, step));
    if (sums_wanted && k % kept == 0) {
      const Tensor of_steps = sums.sum(0);
      total = total.defined() ? total.add_(of_steps) : of_steps;
    }
  }

  // The gradients of x's part.
  const Tensor of_x = c ? dpre : at::cat({dpre.narrow(1, hidden, 2 * hidden), dpre.narrow(1, 0, hidden)}, 1);
  Tensor dx, dweight_ih, dweight_hh, dbias_ih, dbias_hh;
  if (mask[0]) dx = Product(weight_ih.t(), of_x.size(0), 1).times(of_x).view(x.sizes());
  if (mask[3]) dweight_ih = product_over_rows(of_x, by_rows(x));
  if (mask[4]) {
    std::vector<Tensor> states;
    for (int64_t step = 0; step < steps.count(); ++step)
      for (const Tensor& part : before(step, h0, output_rows)) states.push_back(part);
    dweight_hh = product_over_rows(of_h, at::cat(states));
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

// ---- meta -----------------------------------------------------------------------------------------------------------

namespace {

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

}  // namespace

TORCH_LIBRARY_IMPL(leaf_cuda, Meta, library) {
  if (!is_unregistered(c10::DispatchKey::Meta, kRecurrentForward)) return;
  library.impl("leaf_recurrent_forward", forward_meta);
  library.impl("leaf_recurrent_backward", backward_meta);
}

}  // namespace leaf_cuda
