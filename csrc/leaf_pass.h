// One pass of an operation over u: makes its plan and arguments from tensors of any layout.
//
// Parameters are read, and their gradients written, in place. Where that cannot be (Broadcast::matrix), or a wanted
// gradient has fewer values than the plan, they are copied, and gradients of `count` values are summed to their shapes.
// Both together may take half of workspace_limit; for more, the pass runs window by window (Broadcast::Window).
#pragma once

#include <array>

#include "broadcast.h"
#include "leaf_ops.h"

namespace leaf_cuda {

// Returns a new tensor like u for a result, and sets `source` to the tensor to read u from: u itself or, where u has
// gaps or overlaps, the result, filled with u.
Tensor result_like(const Tensor& u, Tensor& source);

// The pitch of a tensor's lines, the runs along its last dimension: a line's elements are contiguous, and the next
// line, in the order of the shape, begins `pitch` elements on. None where they do not lie so.
std::optional<int64_t> line_pitch(const Tensor& t);

bool same_layout(const Tensor& a, const Tensor& b);

// What Pass::run_with_sums returns for a u without elements: zeros.
std::array<Tensor, 4> no_sums(const ParameterList& parameters, std::array<bool, 4> wanted);

class Pass {
 public:
  // u is dense or, with by_lines, has a line_pitch; so have all operands then. parameters: one set or more; gradients
  // are those of the first set. All must live until the pass has run.
  Pass(Operation operation, const Tensor& u, at::ArrayRef<OptionalTensor> parameters, bool by_lines = false);

  // t has u's shape, in any layout. Inputs are added in the order of the operation, after u.
  void add_input(const Tensor& t);
  // t has u's layout (by lines: a line_pitch), or is undefined where it is not wanted. It may be u.
  void add_output(const Tensor& t);

  void run(Run by);
  // Returns the gradients of the first set's parameters that are wanted and defined.
  std::array<Tensor, 4> run_with_sums(Run by, std::array<bool, 4> wanted);

 private:
  // Runs and returns true if the parameters and these gradients need no copies.
  bool run_in_place(Run by, const std::array<Tensor, 4>& dp);
  // Number of parameters for a window, if each needs `bytes` besides its copies. Takes both off args_.workspace.
  int64_t window_size(int64_t bytes);
  void run_window(Run by, const Broadcast::Window& window, Args args) const;

  const Tensor& u_;
  Broadcast broadcast_;
  c10::SmallVector<Tensor, 8> parameters_;  // undefined where there is none
  std::array<Tensor, kMaxInputs> inputs_;
  Args args_{};
  int next_input_ = 1, next_output_ = 0;
};

}  // namespace leaf_cuda
