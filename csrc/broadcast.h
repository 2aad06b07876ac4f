// From the shapes and strides of u and the parameters to a Plan, and from a parameter's own shape to the plan's run of
// `count` values: as a matrix where it lies, or by a copy.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "leaf_args.h"

namespace leaf_cuda {

class Broadcast {
 public:
  // u is non-overlapping and dense; each parameter broadcasts to u's shape (leaf_pass.h sees to both). By lines, u is
  // taken in the order of its shape, and the last dimension is one that a parameter varies along: `count` is a multiple
  // of its size, and `inner` 1.
  Broadcast(const at::Tensor& u, at::ArrayRef<at::Tensor> parameters, bool by_lines = false);

  const Plan& plan() const { return plan_; }

  // Whether a parameter, or its gradient, has a value for each of the run.
  bool has_all(const at::Tensor& parameter) const { return parameter.numel() == plan_.count; }

  // The run as a matrix, and in it the strides of each tensor: those of parameters, or of their gradients, defined or
  // not. None where the run's dimensions are more than two to them: (C, 1, W) in (C, H, W).
  struct Matrix {
    ParameterMatrix of_run;
    c10::SmallVector<ParameterStrides, 12> strides;
  };
  std::optional<Matrix> matrix(at::ArrayRef<const at::Tensor*> tensors) const;

  // Some of the run's parameters: `count` of them from `first` on, those at the indices `begin` to `begin + size` of
  // the run's dimensions. In u they have the elements of a Plan with gaps, from element first·inner on.
  struct Window {
    at::DimVector begin, size;
    int64_t first, count;
  };

  // f(window) for windows that make up the run, of `most` parameters at most: one, if that is all.
  template <class F>
  void for_each_window(int64_t most, F f) const;

  // Whether memory holds the parameter's values in the order of the plan, `count` of them, or one for all.
  bool lies_flat(const at::Tensor& parameter) const;

  // The parameter's values in a window, in the order of the plan: `count` of them, or one for all. No copy where memory
  // already holds them so.
  at::Tensor flatten(const at::Tensor& parameter, const Window& window) const;

  // The transpose of `flatten`: adds a window's gradients, contiguous and in the order of the plan, to a gradient of
  // the parameter's shape. Independent of the number of threads.
  void add(const at::Tensor& flat, const Window& window, const at::Tensor& gradient) const;

 private:
  int64_t run_size(size_t k) const { return sizes_[run_[k]]; }
  // A view of the part that a window takes of a parameter: of the run's dimensions, 1 where the parameter does not
  // vary.
  at::Tensor part(const at::Tensor& parameter, const Window& window) const;

  Plan plan_;
  at::IntArrayRef sizes_;
  // The dimensions of u from the first to the last, in memory order, along which a parameter varies: `count` is the
  // product of their sizes. Those between that no parameter varies along are part of it: (C, 1, W) counts C·H·W.
  at::DimVector run_;
};

template <class F>
void Broadcast::for_each_window(int64_t most, F f) const {
  Window w{at::DimVector(run_.size(), 0), at::DimVector(run_.size(), 1), 0, plan_.count};
  // Dimension `cut` is cut into pieces, of those before it each index is a window's own; the parameters of one index of
  // `cut` are `behind`.
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
