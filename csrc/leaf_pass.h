// One pass of an operation over u: its plan and arguments, made of tensors of any layout.
//
// Parameters are read, and their gradients written, where they lie. Where that cannot be (Broadcast::matrix), or a
// wanted gradient has fewer values than the plan, they are copied and the gradients summed from `count` values each.
// Both may take half of workspace_limit; so where there are many, the pass runs window by window (Broadcast::Window).
#pragma once

#include <array>

#include "broadcast.h"
#include "leaf_ops.h"

namespace leaf_cuda {

// A tensor like u for a result, and the tensor to read u from: u itself, or the result filled with u where u has gaps
// or overlaps.
Tensor result_like(const Tensor& u, Tensor& source);

// Where the lines of a tensor's last dimension lie, one after the other in the order of the shape: no elements between
// those of a line, `pitch` elements from line to line. No pitch where they do not lie so.
std::optional<int64_t> line_pitch(const Tensor& t);

bool same_layout(const Tensor& a, const Tensor& b);

// What `Pass::run_with_sums` gives of no elements.
std::array<Tensor, 4> no_sums(const ParameterList& parameters, std::array<bool, 4> wanted);

class Pass {
 public:
  // u is dense; or, with by_lines, has a line_pitch, as all operands then. parameters: one set or more; the first's are
  // those that gradients are of. All live until the pass has run.
  Pass(Operation operation, const Tensor& u, at::ArrayRef<OptionalTensor> parameters, bool by_lines = false);

  // t has u's shape, in any layout. In the order of the operation, behind u.
  void add_input(const Tensor& t);
  // t has u's layout (by lines: a line_pitch), or is undefined where it is not wanted. It may be u.
  void add_output(const Tensor& t);

  void run(Run by);
  // The gradients of the first set's parameters, those that are wanted and there.
  std::array<Tensor, 4> run_with_sums(Run by, std::array<bool, 4> wanted);

 private:
  // Runs and returns true, if the parameters and these gradients need no copies.
  bool run_in_place(Run by, const std::array<Tensor, 4>& dp);
  // How many parameters a window may have, when each takes so many bytes beside its copies.
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
