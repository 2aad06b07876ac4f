// What a backend's loops are given: plain pointers and a plan.
#pragma once

#include <c10/core/ScalarType.h>

#include "leaf_plan.h"

namespace leaf_cuda {

// The four parameters in the order of the plan: p[q] has `count` values, or one for all (stride[q] 1 or 0); null stands
// for zeros.
struct FlatParameters {
  c10::ScalarType dtype;
  const void* p[4];
  int64_t stride[4];
};

struct ForwardArgs {
  Plan plan;
  FlatParameters parameters;
  c10::ScalarType dtype;  // of u and y
  const void* u;
  void* y;  // may be u
};

struct BackwardArgs {
  Plan plan;
  FlatParameters parameters;
  c10::ScalarType dtype;  // of u, grad and du
  const void* u;
  const void* grad;
  int grad_stride;  // 1, or 0 where all of grad is one element
  void* du;         // null if not needed; may be u
  void* dp[4];      // `count` values of dp_dtype each; null if not needed
  c10::ScalarType dp_dtype;
};

}  // namespace leaf_cuda
