// The CPU's single-threaded inner loops over plain pointers: one table for each instruction set and storage type.
// leaf_cpu.cpp chooses the table and divides the work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../leaf_operations.h"

namespace leaf_cuda::cpu {

// Size of the widest vector. Sums and copied parameters are aligned to it, so that no vector crosses a cache line.
constexpr int64_t kVectorBytes = 64;
// Numbers in the widest vector. Folded rows (leaf_plan.h) are a multiple of it long, so that only the last, partial one
// can end within a vector.
constexpr int64_t kColumnMultiple = kVectorBytes / sizeof(float);
// A block of columns is narrow enough that its parameters and sums, at most this many numbers, stay in the nearest
// caches.
constexpr int64_t kColumnNumbers = 24576;
template <class Op>
constexpr int64_t kColumnBlock =
    std::min<int64_t>(2048, kColumnNumbers / (4 * Op::sets + Op::sums) / kColumnMultiple * kColumnMultiple);
// Distance from one gradient's sums to the next one's: no power of two, which would map all of them to the same sets of
// a cache.
template <class Op>
constexpr int64_t kSumStride = kColumnBlock<Op> + 80;
// Pointers to the first elements of an operation's inputs and outputs (leaf_operations.h), which are stored as double,
// float, bfloat16 or half; arithmetic is in double for double, else in float. in_stride is 1, or 0 if the input is a
// single element, which is broadcast. An output that is not needed is null.
struct Operands {
  const void* in[kMaxInputs];
  int in_stride[kMaxInputs];
  void* out[kMaxOutputs];
  // Number of elements from row to row, for pitched operations.
  int64_t in_row[kMaxInputs], out_row[kMaxOutputs];
};

// Elements begin, ..., end − 1 of the operands.
struct Segment {
  int64_t begin, end;
};

// With `stream`, outputs may be written by streaming (non-temporal) stores: the caller must then issue a fence before
// another thread reads them.
struct InnerLoops {
  // Computes `count` segments, runs of elements that share their parameters. Segment k takes p[4·sets·k],
  // p[4·sets·k + 1], ...; its parameter gradients are written to sums[Op::sums·k], ... Null if the operation is
  // `always_pitched`: then no two columns share their parameters.
  void (*segments)(const Operands&, const Segment*, int64_t count, const double* p, bool stream, double* sums);

  // Computes a block of rows × columns elements; rows are `stride` elements apart (for pitched operations: in_row and
  // out_row). Column c takes the parameters p[q][c], readable up to the next multiple of kColumnMultiple; its parameter
  // gradients are written to sums[q·kSumStride<Op> + c]. Parameters and sums are in the arithmetic type.
  void (*columns)(const Operands&, int64_t rows, int64_t stride, int64_t columns, const void* const* p, bool stream,
                  void* sums);
};

struct InnerLoopsByOperation {
  InnerLoops loops[Operations::count];  // in the enumeration's order

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
