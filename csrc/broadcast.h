// Turns the shapes and strides of u and the parameters into a Plan, and maps a parameter's own shape to the plan's run
// of `count` values: as a matrix in place, or by a copy.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "leaf_args.h"

namespace leaf_cuda {

class Broadcast {
 public:
  // u is non-overlapping and dense, unless by_lines; each parameter broadcasts to u's shape (leaf_pass.h ensures both).
  // With by_lines, u's dimensions are taken in the order of its shape, and the last one as if a parameter varied along
  // it: `count` is a multiple of its size, and `inner` is 1.
  Broadcast(const at::Tensor& u, at::ArrayRef<at::Tensor> parameters, bool by_lines = false);

  const Plan& plan() const { return plan_; }

  // Whether a parameter, or its gradient, has a value of its own for each place in the run.
  bool has_all(const at::Tensor& parameter) const { return parameter.numel() == plan_.count; }

  // The run as a matrix, and the strides in it of each tensor: parameters or their gradients, defined or not. None
  // where no matrix fits all of them: (C, 1, W) in (C, H, W).
  struct Matrix {
    ParameterMatrix of_run;
    c10::SmallVector<ParameterStrides, 12> strides;
  };
  std::optional<Matrix> matrix(at::ArrayRef<const at::Tensor*> tensors) const;

  // Part of the run: the `count` parameters from `first` on, which have the indices from `begin` to `begin + size` in
  // the run's dimensions. Their elements of u make a Plan with gaps, from element first·inner on.
  struct Window {
    at::DimVector begin, size;
    int64_t first, count;
  };

  // Calls f(window) for windows of at most `most` parameters that make up the run: for a single one, if that is enough.
  template <class F>
  void for_each_window(int64_t most, F f) const;

  // Whether memory holds the parameter's values in the plan's order: `count` of them, or one for all.
  bool lies_flat(const at::Tensor& parameter) const;

  // The parameter's values in a window, in the plan's order: `count` of them, or one for all. Copied only if memory
  // does not already hold them so.
  at::Tensor flatten(const at::Tensor& parameter, const Window& window) const;

  // The transpose of `flatten`: adds a window's gradients, contiguous and in the plan's order, to a gradient of the
  // parameter's shape. The result does not depend on the number of threads.
  void add(const at::Tensor& flat, const Window& window, const at::Tensor& gradient) const;

 private:
  int64_t run_size(size_t k) const { return sizes_[run_[k]]; }
  // A view of a window's part of a parameter, with the run's dimensions: of size 1 where the parameter does not vary.
  at::Tensor part(const at::Tensor& parameter, const Window& window) const;

  Plan plan_;
  at::IntArrayRef sizes_;
  // u's dimensions, in memory order, from the first to the last along which a parameter varies; `count` is the product
  // of their sizes. Those between along which none varies are included: (C, 1, W) counts C·H·W.
  at::DimVector run_;
};

template <class F>
void Broadcast::for_each_window(int64_t most, F f) const {
  Window w{at::DimVector(run_.size(), 0), at::DimVector(run_.size(), 1), 0, plan_.count};
  // Dimension `cut` is cut into pieces; a window has one index of each dimension before it, and all of those after it.
  // `behind` is the number of parameters for each index of `cut`.
  size_t cut = 0;
  int64_t behind = plan_.count;
  for (; cut < run_.size() && (behind /= run_size(cut)) > most; ++cut);
  for (size_t k = cut; k < run_.size(); ++k) w.size[k] = run_size(k);
  if (plan_.count <= most) return f(w);
  for (; w.first < plan_.count; w.first += w.count) {
    int64_t index = w.first / behind;
    for (size_t k = cut + 1; k-- > 0; index /= run_size(k)) w.begin[k] = index % run_size(k);
    w.size[cut] = std::min(most / behind, run_size(cut) - w.begin[cut]);
    w.count = w.size[cut] * behind;
    f(w);
  }
}

}  // namespace leaf_cuda
