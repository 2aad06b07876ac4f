// Checks of the operators' arguments. Each throws a TypeError or ValueError that names the argument.
#pragma once

#include <string>

#include "leaf_ops.h"

namespace leaf_cuda {

constexpr const char* kNames[] = {"p1", "p2", "p3", "p4"};

// The dtype's name in Python: "torch.float32".
std::string dtype_name(at::ScalarType type);

// The names of the operator and of its u in messages.
struct Names {
  const char* function = "leaf";
  const char* u = "u";
};

void check(const Tensor& u, const ParameterList& parameters, const Names& names = {});

// Parts of `check`: u's dtype; the dtype and device of parameter p.
void check_dtype(const Tensor& u, const Names& names);
void check_parameter_type(const Names& names, const char* name, const Tensor& p, const Tensor& p1, const Tensor& u);

// Must run before the dispatcher chooses a kernel by layout: its own errors do not name the argument.
void check_layout(const char* function, const char* name, const Tensor& t);
void check_layout(const char* function, const char* name, const OptionalTensor& t);
void check_layout(const Tensor& u, const ParameterList& parameters, const Names& names = {});

// Checks that t, called `name` in messages ("leaf_backward: grad"), has the dtype, the device and the shape of `like`.
void check_like(const char* name, const Tensor& t, const char* like_name, const Tensor& like);

// The arguments of leaf_double_backward; vp is v1, ..., v4.
void check_double_backward(const OptionalTensor& v, const ParameterList& vp, const Tensor& grad, const Tensor& u,
                           const ParameterList& parameters);

}  // namespace leaf_cuda
