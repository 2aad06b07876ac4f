// From the shapes and strides of u and the parameters to a Plan, and between a parameter's own shape and the plan's
// flat run of `count` values.
#pragma once

#include <ATen/core/Tensor.h>

#include "leaf_plan.h"

namespace leaf_cuda {

class Broadcast {
 public:
  // u is non-overlapping and dense; each parameter broadcasts to u's shape (leaf_ops.cpp checks both). By lines, u is
  // taken in the order of its shape, and the last dimension is one that a parameter varies along: `count` is a multiple
  // of its size, and `inner` 1.
  Broadcast(const at::Tensor& u, at::ArrayRef<at::Tensor> parameters, bool by_lines = false);

  const Plan& plan() const { return plan_; }

  // The parameter's values in the order of the plan: `count` of them, or one for all. No copy where memory already
  // holds them so.
  at::Tensor flatten(const at::Tensor& parameter) const;

  // Whether `count` values in the order of the plan are a contiguous tensor of the parameter's shape.
  bool is_flat(const at::Tensor& parameter) const;

  // The transpose of `flatten`: sums `count` gradients into the parameter's shape. Independent of the number of
  // threads.
  at::Tensor unflatten(const at::Tensor& flat, const at::Tensor& parameter) const;

 private:
  Plan plan_;
  at::IntArrayRef sizes_;
  // The dimensions of u from the first to the last, in memory order, along which a parameter varies: `count` is the
  // product of their sizes. Those between that no parameter varies along are part of it: (C, 1, W) counts C·H·W.
  at::DimVector run_;
};

}  // namespace leaf_cuda
