// How a plan's elements are divided among blocks and threads: by host code alone, so that it is tested without a GPU.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "../leaf_plan.h"

namespace leaf_cuda::cuda {

constexpr int kMaxThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxGridY = 65535;
// Blocks for each multiprocessor: as many as fit at kMaxThreads threads and few registers.
constexpr int64_t kBlocksPerMultiprocessor = 8;
// Beyond so many times that, blocks take several items each.
constexpr int64_t kMaxWaves = 16;
// A thread adds up so many elements at most: beyond, a float32 sum would lose to eager PyTorch's.
constexpr int64_t kMaxSerialSum = 1024;
// Rows of at least so many bytes are read by neighbouring threads without much waste; shorter ones count as columns.
constexpr int64_t kMinRowBytes = 64;
// Narrower matrices would leave a warp's threads without work.
constexpr int64_t kMinColumnVectors = 32;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t max_grid(int64_t multiprocessors) { return multiprocessors * kBlocksPerMultiprocessor * kMaxWaves; }

// Rows: a run of `inner` elements has one parameter. A block takes one parameter k and one of `splits` shares of the
// vectors of k's `outer` rows. Vectors are aligned in memory, so that a row's first and last may be partial.
struct RowsLaunch {
  int64_t outer, count, inner, pitch;
  int64_t vectors;  // slots for vectors in a row; the last may be empty
  int64_t splits;
  // A thread goes on by splits·threads slots: so many rows and vectors.
  int64_t step_rows, step_vectors;
  int64_t grid;
  int threads;
};

inline RowsLaunch plan_rows(const Plan& plan, int vector, int unroll, int64_t multiprocessors) {
  RowsLaunch r{plan.outer, plan.count, plan.inner, plan.pitch};
  const bool aligned = plan.inner % vector == 0 && plan.pitch % vector == 0;
  r.vectors = aligned ? plan.inner / vector : (plan.inner + 2 * vector - 2) / vector;
  const int64_t slots = r.outer * r.vectors;
  r.threads = static_cast<int>(std::clamp<int64_t>(round_up(ceil_div(slots, unroll), kWarp), kWarp, kMaxThreads));
  const int64_t to_fill = ceil_div(multiprocessors * kBlocksPerMultiprocessor, r.count);
  const int64_t with_work = ceil_div(slots, int64_t{r.threads} * unroll);
  const int64_t for_accuracy = ceil_div(slots * vector, r.threads * kMaxSerialSum);
  r.splits = std::max(std::min(to_fill, with_work), for_accuracy);
  r.step_rows = r.splits * r.threads / r.vectors;
  r.step_vectors = r.splits * r.threads % r.vectors;
  r.grid = std::min(r.count * r.splits, max_grid(multiprocessors));
  return r;
}

// Columns (leaf_plan.h): a block takes a tile of tx vectors of columns and one of `splits` shares of the rows, ty rows
// at a time. A tile holds whole parameters, so that it can sum over their `inner` columns.
struct ColumnsLaunch {
  Columns columns;
  int64_t count, inner;
  int64_t slots;  // parameters in a row of the matrix: fold·count
  int64_t line;   // of pitched operations: elements of an operand's line, which divides the width
  int64_t tiles, splits;
  int tx, ty, threads;
};

// `run` is Args::run: 0, or what the width must be a multiple of, and vectors must divide. sums_bytes: of all sums of
// one parameter index; 0 where there are none, which take no workspace.
inline ColumnsLaunch plan_columns(const Plan& plan, int64_t run, int vector, int unroll, int64_t multiprocessors,
                                  int64_t workspace, int64_t sums_bytes) {
  ColumnsLaunch c{run ? columns_of(plan, 1, 1) : columns_of(plan, vector, kMinColumnVectors * vector), plan.count,
                  plan.inner};
  c.line = run ? run : c.columns.width;
  const int64_t rows = c.columns.rows + (c.columns.tail ? 1 : 0);
  c.slots = c.columns.fold * plan.count;
  const int64_t width = c.columns.width / vector;
  const int64_t unit = std::lcm(plan.inner, int64_t{vector}) / vector;
  const int64_t tiles = ceil_div(width, kMaxThreads / unit * unit);
  c.tx = static_cast<int>(round_up(ceil_div(width, tiles), unit));
  c.tiles = ceil_div(width, c.tx);
  c.ty = static_cast<int>(std::clamp<int64_t>(ceil_div(rows, unroll), 1, kMaxThreads / c.tx));
  c.threads = static_cast<int>(round_up(int64_t{c.tx} * c.ty, kWarp));
  const int64_t to_fill = ceil_div(multiprocessors * kBlocksPerMultiprocessor, c.tiles);
  const int64_t with_work = ceil_div(rows, int64_t{c.ty} * unroll);
  const int64_t for_accuracy = ceil_div(rows, c.ty * kMaxSerialSum);
  const int64_t with_space = sums_bytes ? workspace / (sums_bytes * c.slots) : kMaxGridY;
  c.splits = std::max(std::min(to_fill, with_work), for_accuracy);
  c.splits = std::clamp<int64_t>(std::min(c.splits, with_space), 1, kMaxGridY);
  return c;
}

inline bool by_rows(const Plan& plan, int64_t element_bytes) { return plan.inner * element_bytes >= kMinRowBytes; }

// Whether vectors of columns are worth their partial sums: with a fold these need a workspace whatever the splits.
inline bool columns_fit(const ColumnsLaunch& c, int64_t workspace, int64_t sums_bytes) {
  return c.columns.fold == 1 || sums_bytes * c.slots <= workspace;
}

// Partial sums, [part][q][slot], slot = fold index · count + parameter index. Where there is one part and no fold, they
// are whole: the gradients themselves, without a workspace.
struct PartialSums {
  int64_t sums, parts, fold, count;
  bool whole;
  int64_t values;  // in the workspace
};

inline PartialSums partial_sums(int64_t sums, int64_t parts, int64_t fold, int64_t count) {
  const bool whole = sums == 0 || (parts == 1 && fold == 1);
  return {sums, parts, fold, count, whole, whole ? 0 : parts * sums * fold * count};
}

// The finishing kernel, for each of the sums: kx parameters by ky shares of their partial sums in a block; ky is a
// power of two.
struct FinishLaunch {
  PartialSums sums;
  int64_t grid;  // by as many as there are sums
  int kx, ky;
};

inline FinishLaunch plan_finish(const PartialSums& sums, int64_t multiprocessors) {
  int kx = 1;
  while (kx < kWarp && kx < sums.count) kx *= 2;
  return {sums, std::min(ceil_div(sums.count, kx), max_grid(multiprocessors)), kx, kMaxThreads / kx};
}

}  // namespace leaf_cuda::cuda
