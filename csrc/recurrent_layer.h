// The arguments of a recurrent layer's operators, their checks, and the steps of a sequence.
#pragma once

#include <ATen/ops/cat.h>

#include "leaf_ops.h"

namespace leaf_cuda {

// The differences between LSTM and GRU. A row of pre-activations has four columns of `hidden` elements each; weights
// have `gates` of them.
struct Cell {
  const char* function;
  Operation forward, backward;
  int sets;       // of parameters
  int column[4];  // of each of the operation's inputs 0 ... 3
  int gates;
  int recurrent;  // the first column that h contributes to
};
inline constexpr Cell kLstm = {"leaf_lstm", Operation::lstm_forward, Operation::lstm_backward, 5, {0, 1, 2, 3}, 4, 0};
// x contributes (r, z, n) and h contributes (r, z, m). A row is (n, r, z, m), so that h's part is contiguous and in the
// order of its weights.
inline constexpr Cell kGru = {"leaf_gru", Operation::gru_forward, Operation::gru_backward, 3, {1, 2, 0, 3}, 3, 1};

inline const Cell& cell_of(const OptionalTensor& c) { return c ? kLstm : kGru; }

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

// These throw a TypeError or ValueError that names the argument. They check the layer's arguments; for backward, also
// its forward's results and their gradients; and layouts, before the dispatcher chooses a kernel by layout.
void check_layer(const Layer& l);
void check_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                    const Tensor& output, const Tensor& cells, const Tensor& pre, const Layer& l);
void check_layouts(const Layer& l);

// The steps of a batch of sequences: step t has size[t] rows from first[t] on, those of the first size[t] sequences.
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
  // The step that is taken as the k-th.
  int64_t at(int64_t k) const { return reverse ? count() - 1 - k : k; }

  Tensor rows(const Tensor& t, int64_t step, int64_t n) const { return t.narrow(0, first[step], n); }
  Tensor rows(const Tensor& t, int64_t step) const { return rows(t, step, size[step]); }

  // The state before a step, as parts to concatenate by rows: that of the step taken before it, of which
  // state_of(step, n) returns the first n rows, and the initial state of the sequences that that step did not have.
  template <class F>
  std::vector<Tensor> previous(int64_t step, const Tensor& initial, F state_of) const {
    const int64_t before = reverse ? step + 1 : step - 1, n = size[step];
    if (before < 0 || before == count()) return {initial.narrow(0, 0, n)};
    const int64_t passed_on = std::min(n, size[before]);
    const Tensor state = state_of(before, passed_on);
    if (passed_on == n) return {state};
    return {state, initial.narrow(0, passed_on, n - passed_on)};
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

inline Tensor joined(const std::vector<Tensor>& parts) { return parts.size() == 1 ? parts[0] : at::cat(parts); }

inline at::DimVector sizes_with(const Tensor& t, int64_t last) {
  at::DimVector sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = last;
  return sizes;
}

// Keeps autocast off the matrix products: all of the operators' tensors have one dtype.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

}  // namespace leaf_cuda
