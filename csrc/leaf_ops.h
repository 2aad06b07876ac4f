// The operators: schemas, checks, allocation. A backend supplies a Run and registers itself with them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
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
using ElevenTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr const char* kForward = "leaf_cuda::leaf_forward";
constexpr const char* kBackward = "leaf_cuda::leaf_backward";
constexpr const char* kDoubleBackward = "leaf_cuda::leaf_double_backward";
constexpr const char* kGluForward = "leaf_cuda::leaf_glu_forward";
constexpr const char* kGluBackward = "leaf_cuda::leaf_glu_backward";
constexpr const char* kRecurrentForward = "leaf_cuda::leaf_recurrent_forward";
constexpr const char* kRecurrentBackward = "leaf_cuda::leaf_recurrent_backward";

// A backend: runs the operation over a plan with at least one element. On u's device it may allocate a workspace.
using Run = void (*)(const Args&, const Tensor& u);

// The operators, run by a backend: check, plan, allocate, run.
Tensor leaf_forward(Run run, const Tensor& u, const Tensor& p1, const OptionalTensor& p2, const Tensor& p3,
                    const OptionalTensor& p4);
FiveTensors leaf_backward(Run run, const Tensor& grad, const Tensor& u, const Tensor& p1, const OptionalTensor& p2,
                          const Tensor& p3, const OptionalTensor& p4, std::array<bool, 5> mask);
SixTensors leaf_double_backward(Run run, const OptionalTensor& v, const OptionalTensor& v1, const OptionalTensor& v2,
                                const OptionalTensor& v3, const OptionalTensor& v4, const Tensor& grad, const Tensor& u,
                                const Tensor& p1, const OptionalTensor& p2, const Tensor& p3, const OptionalTensor& p4,
                                std::array<bool, 6> mask);

Tensor leaf_glu_forward(Run run, const Tensor& a, const OptionalTensor& b, const Tensor& p1, const OptionalTensor& p2,
                        const Tensor& p3, const OptionalTensor& p4);
SixTensors leaf_glu_backward(Run run, const Tensor& grad, const Tensor& a, const OptionalTensor& b, const Tensor& p1,
                             const OptionalTensor& p2, const Tensor& p3, const OptionalTensor& p4,
                             std::array<bool, 6> mask);

FiveTensors leaf_recurrent_forward(Run run, const Tensor& x, const Tensor& h, const OptionalTensor& c,
                                   const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                   const OptionalTensor& bias_hh, const Tensor& p1, const Tensor& p2, const Tensor& p3,
                                   const Tensor& p4, const OptionalTensor& batch_sizes, bool reverse);
ElevenTensors leaf_recurrent_backward(Run run, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                      const OptionalTensor& grad_c_n, const Tensor& output, const Tensor& cells,
                                      const Tensor& pre, const Tensor& x, const Tensor& h, const OptionalTensor& c,
                                      const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                      const OptionalTensor& bias_hh, const Tensor& p1, const Tensor& p2,
                                      const Tensor& p3, const Tensor& p4, const OptionalTensor& batch_sizes,
                                      bool reverse, std::array<bool, 11> mask);

// The gradients of parameters, on the meta device.
std::array<Tensor, 4> sums_meta(const ParameterList& parameters, std::array<bool, 4> wanted);

void define_operators(torch::Library& library);

// Whether no copy of this library has registered the operator for the key yet. A process may load two copies: _C and
// the C++ library.
bool is_unregistered(c10::DispatchKey key, const char* name = kForward);

// f with its first argument, a Run, bound to `run`: the form that the dispatcher takes.
template <auto f, Run run, class F = decltype(f)>
struct By;
template <auto f, Run run, class Result, class... Arguments>
struct By<f, run, Result (*)(Run, Arguments...)> {
  static Result call(Arguments... arguments) { return f(run, arguments...); }
};

// Calls the operator through the dispatcher; its arguments are f's without the Run.
template <auto f, class F = decltype(f)>
struct Dispatched;
template <auto f, class Result, class... Arguments>
struct Dispatched<f, Result (*)(Run, Arguments...)> {
  const char* name;

  Result operator()(Arguments... arguments) const {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Result(Arguments...)>();
    return op.call(arguments...);
  }
};

template <Run run>
void implement_operators(torch::Library& library) {
  library.impl("leaf_forward", By<leaf_forward, run>::call);
  library.impl("leaf_backward", By<leaf_backward, run>::call);
  library.impl("leaf_double_backward", By<leaf_double_backward, run>::call);
  library.impl("leaf_glu_forward", By<leaf_glu_forward, run>::call);
  library.impl("leaf_glu_backward", By<leaf_glu_backward, run>::call);
  library.impl("leaf_recurrent_forward", By<leaf_recurrent_forward, run>::call);
  library.impl("leaf_recurrent_backward", By<leaf_recurrent_backward, run>::call);
}

}  // namespace leaf_cuda
