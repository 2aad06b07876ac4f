// The CPU's inner loops, single-threaded, over plain pointers: one table of them for each storage type, for each
// instruction set. leaf_cpu.cpp chooses the table and divides the work.
#pragma once

#include <cstdint>

#include "../leaf_operations.h"

namespace leaf_cuda::cpu {

// A block of columns is narrow enough that its parameters and sums stay in the nearest caches.
constexpr int64_t kColumnBlock = 2048;
// From one parameter's sums to the next: not a power of two, which would map all of them to the same sets of a cache.
constexpr int64_t kSumStride = kColumnBlock + 80;
// Columns come in multiples of the widest vector, so that only a matrix's last row can end inside one.
constexpr int64_t kColumnMultiple = 16;

// An operation's inputs and outputs (leaf_operations.h), at the first element. in_stride is 1, or 0 where all of the
// input is one element; an output is null if not needed. Storage is void: double, float, bfloat16 or half. Arithmetic:
// double for double, else float.
struct Operands {
  const void* in[kMaxInputs];
  int in_stride[kMaxInputs];
  void* out[kMaxOutputs];
  // Elements from row to row, for pitched operations.
  int64_t in_row[kMaxInputs], out_row[kMaxOutputs];
};

// With `stream` the outputs may be stored past the caches.
struct InnerLoops {
  // A segment is a run of n elements that share the parameters p[0], p[1], ... Adds the segment's parameter gradients
  // to sums[0..3].
  void (*segment)(const Operands&, int64_t n, const double* p, bool stream, double* sums);

  // A block of columns: rows × columns elements, `stride` elements from row to row (or, of pitched operations, in_row
  // and out_row). Column c has the parameters p[q][c], in the arithmetic type, readable up to the next multiple of
  // kColumnMultiple. Writes column c's parameter gradients to sums[q·kSumStride + c], in the arithmetic type.
  void (*columns)(const Operands&, int64_t rows, int64_t stride, int64_t columns, const void* const* p, bool stream,
                  void* sums);
};

struct InnerLoopsByOperation {
  InnerLoops forward, backward, double_backward, glu_forward, glu_backward;

  const InnerLoops& operator[](Operation operation) const {
    switch (operation) {
      case Operation::forward:
        return forward;
      case Operation::backward:
        return backward;
      case Operation::double_backward:
        return double_backward;
      case Operation::glu_forward:
        return glu_forward;
      default:
        return glu_backward;
    }
  }
};

struct InnerLoopsByType {
  InnerLoopsByOperation float64, float32, bfloat16, float16;
};

extern const InnerLoopsByType kLoopsBaseline;
#if defined(__x86_64__)
extern const InnerLoopsByType kLoopsAvx2, kLoopsAvx512;
#endif

}  // namespace leaf_cuda::cpu
