// The arguments of a backend's loops: plain pointers and a plan.
#pragma once

#include <c10/core/ScalarType.h>

#include "leaf_operations.h"
#include "leaf_plan.h"

namespace leaf_cuda {

struct ParameterIndex {
  int64_t row, column;
};

// A plan's `count` parameters, in the plan's order, as a row-major matrix. A tensor may have any strides from row to
// row and from column to column, so that it is used in place. Tensors that lie in the plan's order make a single row;
// per element with u in channels_last, there are H·W rows of C columns.
struct ParameterMatrix {
  int64_t rows, columns;

  LEAF_FUNCTION ParameterIndex at(int64_t k) const {
    const int64_t row = rows == 1 ? 0 : k / columns;
    return {row, k - row * columns};
  }
  // Moves to the next index, from the last one to the first.
  LEAF_FUNCTION void advance(ParameterIndex& i) const {
    if (++i.column < columns) return;
    i.column = 0;
    if (++i.row == rows) i.row = 0;
  }
};

// A tensor's strides in elements, from row to row and from column to column; 0 where it does not vary.
struct ParameterStrides {
  int64_t row, column;

  LEAF_FUNCTION int64_t at(const ParameterIndex& i) const { return i.row * row + i.column * column; }
};

// The parameters, set by set; a null pointer, with strides of 0, stands for zeros.
struct ParameterArgs {
  c10::ScalarType dtype;
  ParameterMatrix matrix;
  const void* p[kMaxParameters];
  ParameterStrides strides[kMaxParameters];
};

struct Args {
  Operation operation;
  Plan plan;
  ParameterArgs parameters;
  c10::ScalarType dtype;  // of inputs and outputs
  const void* in[kMaxInputs];
  int in_stride[kMaxInputs];  // 1, or 0 for an input that is one repeated element; u's is 1
  void* out[kMaxOutputs];     // null if not needed; may be an input of the same layout
  void* dp[kMaxSums];         // one value for each of the `count` parameters; null if not needed
  ParameterStrides dp_strides[kMaxSums];
  c10::ScalarType dp_dtype;
  int64_t workspace;  // bytes that partial sums may take
  // For pitched operations: element i of an operand is at i / line · its pitch + i % line; the plan's `inner` is then 1
  // and its `count` a multiple of `line`. With a line of 0 all operands lie as the plan says.
  int64_t line;
  int64_t in_pitch[kMaxInputs], out_pitch[kMaxOutputs];
};

// Calls f with a zero of the dtype's C++ type.
template <class F>
void dispatch_dtype(c10::ScalarType dtype, F f) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return f(double{});
    case c10::ScalarType::Float:
      return f(float{});
    case c10::ScalarType::BFloat16:
      return f(c10::BFloat16{});
    default:
      return f(c10::Half{});
  }
}

}  // namespace leaf_cuda
