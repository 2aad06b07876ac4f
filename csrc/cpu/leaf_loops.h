// The CPU's inner loops, single-threaded, over plain pointers: one table of them for each storage type, for each
// instruction set. leaf_cpu.cpp chooses the table and divides the work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../leaf_operations.h"

namespace leaf_cuda::cpu {

// The widest vector's. Sums and copied parameters are aligned to it, lest their vectors lie across cache lines.
constexpr int64_t kVectorBytes = 64;
// Columns come in multiples of the widest vector, so that only a matrix's last row can end inside one.
constexpr int64_t kColumnMultiple = kVectorBytes / sizeof(float);
// A block of an operation's columns is narrow enough that its parameters and sums, so many numbers, stay in the nearest
// caches.
constexpr int64_t kColumnNumbers = 24576;
template <class Op>
constexpr int64_t kColumnBlock =
    std::min<int64_t>(2048, kColumnNumbers / (4 * Op::sets + Op::sums) / kColumnMultiple * kColumnMultiple);
// From one parameter's sums to the next: not a power of two, which would map all of them to the same sets of a cache.
template <class Op>
constexpr int64_t kSumStride = kColumnBlock<Op> + 80;
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

// Elements begin, ..., end − 1 of the operands.
struct Segment {
  int64_t begin, end;
};

// With `stream` the outputs may be stored past the caches: before another thread reads them, the caller must put a
// fence.
struct InnerLoops {
  // Segments, runs of elements that share their parameters: the k-th has p[4·sets·k], p[4·sets·k + 1], ... Writes its
  // parameter gradients to sums[Op::sums·k], ... Null where an operation is `always_pitched`: no two columns
  // share their parameters.
  void (*segments)(const Operands&, const Segment*, int64_t count, const double* p, bool stream, double* sums);

  // A block of columns: rows × columns elements, `stride` elements from row to row (or, of pitched operations, in_row
  // and out_row). Column c has the parameters p[q][c], in the arithmetic type, readable up to the next multiple of
  // kColumnMultiple. Writes column c's parameter gradients to sums[q·kSumStride<Op> + c], in the arithmetic type.
  void (*columns)(const Operands&, int64_t rows, int64_t stride, int64_t columns, const void* const* p, bool stream,
                  void* sums);
};

struct InnerLoopsByOperation {
  InnerLoops loops[kOperations];  // in the enumeration's order

  const InnerLoops& operator[](Operation operation) const { return loops[static_cast<int>(operation)]; }
};

struct InnerLoopsByType {
  InnerLoopsByOperation float64, float32, bfloat16, float16;
};

extern const InnerLoopsByType kLoopsBaseline;
#if defined(__x86_64__)
extern const InnerLoopsByType kLoopsAvx2, kLoopsAvx512;
#endif

}  // namespace leaf_cuda::cpu
