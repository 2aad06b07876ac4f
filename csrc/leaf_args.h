// What a backend's loops are given: plain pointers and a plan.
#pragma once

#include <c10/core/ScalarType.h>

#include "leaf_operations.h"
#include "leaf_plan.h"

namespace leaf_cuda {

// The parameters, set by set, in the order of the plan: p[q] has `count` values, or one for all (stride[q] 1 or 0);
// null stands for zeros.
struct FlatParameters {
  c10::ScalarType dtype;
  const void* p[kMaxParameters];
  int64_t stride[kMaxParameters];
};

struct Args {
  Operation operation;
  Plan plan;
  FlatParameters parameters;
  c10::ScalarType dtype;  // of inputs and outputs
  const void* in[kMaxInputs];
  int in_stride[kMaxInputs];  // 1, or 0 where all of the input is one element; u's is 1
  void* out[kMaxOutputs];     // null if not needed; one may be an input that lies alike
  void* dp[kMaxSums];         // `count` values of dp_dtype each; null if not needed
  c10::ScalarType dp_dtype;
  int64_t workspace;  // bytes that partial sums may take
  // For pitched operations: element i of an operand is at i / run · its pitch + i % run; the plan's `inner` is then 1
  // and its `count` a multiple of `run`. With a run of 0 all operands lie as the plan says.
  int64_t run;
  int64_t in_pitch[kMaxInputs], out_pitch[kMaxOutputs];
};

// f(the operation's type)
template <class F>
void dispatch_operation(Operation operation, F f) {
  switch (operation) {
    case Operation::forward:
      return f(Forward());
    case Operation::backward:
      return f(Backward());
    case Operation::double_backward:
      return f(DoubleBackward());
    case Operation::glu_forward:
      return f(GluForward());
    case Operation::glu_backward:
      return f(GluBackward());
    case Operation::lstm_forward:
      return f(LstmForward());
    case Operation::lstm_backward:
      return f(LstmBackward());
    case Operation::gru_forward:
      return f(GruForward());
    case Operation::gru_backward:
      return f(GruBackward());
  }
}

}  // namespace leaf_cuda
