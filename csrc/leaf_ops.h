// The operators: schemas, checks, allocation. A backend supplies the two loops and registers itself with them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "leaf_args.h"

namespace leaf_cuda {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using ParameterList = std::array<OptionalTensor, 4>;  // p1, ..., p4
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr const char* kForward = "leaf_cuda::leaf_forward";
constexpr const char* kBackward = "leaf_cuda::leaf_backward";
constexpr const char* kDoubleBackward = "leaf_cuda::leaf_double_backward";

// A backend's loops over a plan with at least one element. On u's device they may allocate a workspace.
struct Loops {
  void (*forward)(const ForwardArgs&, const Tensor& u);
  void (*backward)(const BackwardArgs&, const Tensor& u);
};

// The two operators, run by a backend's loops: check, plan, allocate, run.
Tensor leaf_forward(const Loops& loops, const Tensor& u, const Tensor& p1, const OptionalTensor& p2, const Tensor& p3,
                    const OptionalTensor& p4);
FiveTensors leaf_backward(const Loops& loops, const Tensor& grad, const Tensor& u, const Tensor& p1,
                          const OptionalTensor& p2, const Tensor& p3, const OptionalTensor& p4,
                          std::array<bool, 5> mask);

void define_operators(torch::Library& library);

// Whether no copy of this library has registered the operator for the key yet. One may have: _C and the C++
// library in one process.
bool is_unregistered(c10::DispatchKey key, const char* name = kForward);

template <const Loops& loops>
Tensor leaf_forward_by(const Tensor& u, const Tensor& p1, const OptionalTensor& p2, const Tensor& p3,
                       const OptionalTensor& p4) {
  return leaf_forward(loops, u, p1, p2, p3, p4);
}
template <const Loops& loops>
FiveTensors leaf_backward_by(const Tensor& grad, const Tensor& u, const Tensor& p1, const OptionalTensor& p2,
                             const Tensor& p3, const OptionalTensor& p4, std::array<bool, 5> mask) {
  return leaf_backward(loops, grad, u, p1, p2, p3, p4, mask);
}
template <const Loops& loops>
void implement_operators(torch::Library& library) {
  library.impl("leaf_forward", leaf_forward_by<loops>);
  library.impl("leaf_backward", leaf_backward_by<loops>);
}

}  // namespace leaf_cuda
