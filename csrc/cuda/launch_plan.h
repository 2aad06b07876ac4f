// How a plan's elements are divided among blocks and threads: by host code alone, so that it is tested without a GPU.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>

#include "../leaf_math.h"
#include "../leaf_plan.h"

namespace leaf_cuda::cuda {

constexpr int kMaxThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxGridY = 65535;
// Beyond so many times the blocks that a device holds, blocks take several items each.
constexpr int64_t kMaxWaves = 64;
// A thread adds so many terms to a sum at most: with more, a float32 sum would lose to eager PyTorch's.
constexpr int64_t kMaxSerialSum = 64;
// Rows of at least so many bytes are read by neighbouring threads without much waste; shorter ones are columns.
constexpr int64_t kMinRowBytes = 64;
// A step over rows that are not whole vectors has so many times the instructions and the stores.
constexpr double kPartialRowsCost = 1.5;
// Narrower matrices would leave a warp's threads without work.
constexpr int64_t kMinColumnVectors = 32;
// Of so many tiles of columns the last may be narrower than the others.
constexpr int64_t kManyTiles = 8;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What a block does before and after its steps, and a second kernel that adds up partial sums, each as so many steps.
constexpr double kOwnSteps = 2, kFinishSteps = 2;

// Into how many shares to divide the steps of a pass, and the time that it takes then.
struct Splits {
  int64_t count;
  double time;
};

// The `steps` of each of `items` divided into at_least shares, or as many, up to at_most, as fill the `at_once` blocks
// that a device holds one time or a few: the number that takes the least time. It is counted in steps of one block,
// each at step_cost, of which a device does at_once at a time; fewer blocks, down to half of them, still have all of
// the memory's speed. parts: partial sums of a parameter for each share, 0 where there are no sums.
inline Splits splits_for(int64_t items, int64_t steps, double step_cost, int64_t at_least, int64_t at_most,
                         int64_t at_once, int64_t parts) {
  constexpr int64_t kMaxTimes = 4;
  Splits best{at_least, std::numeric_limits<double>::infinity()};
  const int64_t first = at_least > 1 ? std::max<int64_t>(items * at_least / at_once, 1) : 0;
  for (int64_t times = first; times <= first + kMaxTimes; ++times) {
    const int64_t splits = std::clamp(times * at_once / items, at_least, at_most);
    const int64_t last = items * splits % at_once;
    const int64_t blocks = items * splits - last + (last ? std::max(last, at_once / 2) : 0);
    const double time = double(blocks) * (double(ceil_div(steps, splits)) * step_cost + kOwnSteps) +
                        (parts * splits > 1 ? double(at_once) * kFinishSteps : 0);
    if (time < best.time) best = {splits, time};
  }
  return best;
}

// n items dealt out in turn: each gets so many, and the first `over` one more.
struct Shares {
  int64_t each, over;
  LEAF_FUNCTION int64_t of(int64_t which) const { return each + (which < over); }
};
constexpr Shares shares_of(int64_t n, int64_t among) { return {n / among, n % among}; }

// Rows: a run of `inner` elements has one parameter. A block takes one parameter k and one of `splits` shares of the
// vectors of k's `outer` rows. Vectors are aligned in memory, so that a row's first and last may be partial.
struct RowsLaunch {
  int64_t outer, count, inner, pitch;
  bool aligned;     // every vector is whole
  int64_t vectors;  // slots for vectors in a row; the last may be empty
  Shares slots;     // of all rows of a parameter, among splits·threads
  int64_t splits, items;
  // From slot to slot of a thread: step_vectors, and a row more where there are no such in its own; in elements, `step`
  // and next_row. Where not all vectors are whole, these lead from one row's first element to another's.
  int64_t step_vectors, step, next_row;
  // Where the last row ends, and how many of its elements lie in a vector that is not whole. It is the last slot of
  // this thread of the last parameter's, which does it apart from its others; −1 if there is none.
  int64_t end, rest_thread;
  int rest;
  int64_t grid;
  int threads;
  double time;  // that of splits_for, by the vectors of a step
};

// at_once: blocks that the device holds.
inline RowsLaunch plan_rows(const Plan& plan, int vector, int unroll, int64_t at_once, bool sums) {
  RowsLaunch r{plan.outer, plan.count, plan.inner, plan.pitch};
  // Rows begin at multiples of this, modulo a vector.
  const int64_t begin = std::gcd(std::gcd(plan.inner, plan.pitch), vector);
  r.aligned = begin == vector;
  r.vectors = (plan.inner + 2 * vector - begin - 1) / vector;
  r.end = (r.outer - 1) * r.pitch + r.count * r.inner;
  r.rest = static_cast<int>(r.end % vector);
  const int64_t slots = r.outer * r.vectors;
  r.threads = static_cast<int>(std::clamp<int64_t>(round_up(ceil_div(slots, unroll), kWarp), kWarp, kMaxThreads));
  const int64_t steps = ceil_div(slots, int64_t{r.threads} * unroll);
  // A term is the sum of a step's vectors.
  const int64_t for_accuracy = sums ? ceil_div(steps + (r.rest > 0), kMaxSerialSum) : 1;
  const auto [splits, time] =
      splits_for(r.count, steps, r.aligned ? 1 : kPartialRowsCost, for_accuracy, steps, at_once, sums ? 1 : 0);
  r.splits = splits;
  r.time = time * r.threads * unroll;
  const int64_t threads = r.splits * r.threads;
  r.slots = shares_of(slots, threads);
  r.step_vectors = threads % r.vectors;
  r.step = threads / r.vectors * r.pitch + (r.aligned ? r.step_vectors * vector : 0);
  r.next_row = r.pitch - (r.aligned ? r.vectors * vector : 0);
  const int64_t rest_slot = (r.outer - 1) * r.vectors + r.end / vector - (r.end - r.inner) / vector;
  r.rest_thread = r.rest ? rest_slot % threads : -1;
  r.items = r.count * r.splits;
  r.grid = std::min(r.items, at_once * kMaxWaves);
  return r;
}

// Columns (leaf_plan.h): a block takes a tile of tx vectors of columns and one of `splits` shares of the rows, ty rows
// at a time. A tile holds whole parameters, so that it can sum over their `inner` columns; where it holds the whole
// width, over the periods side by side too.
struct ColumnsLaunch {
  Columns columns;
  int64_t count, inner;
  int64_t slots;  // parameters in a row of the matrix: fold·count
  int64_t line;   // of pitched operations: elements of an operand's line, which divides the width
  int64_t tiles, splits;
  Shares rows;           // the matrix's, but for a last one that is not whole, among splits·ty
  int64_t period_parts;  // periods side by side whose sums a block does not add up
  int results;           // parameters that a block has sums of
  int tile_folds;        // periods that it adds up
  // Threads for each sum, which has terms (rows and periods) by `inner`: so many in each direction, powers of two.
  int term_shares, inner_shares;
  int tx, ty, threads;
  double time;             // as that of rows
  bool parameter_vectors;  // a vector's parameters lie side by side, aligned
};

// Vectors that hold whole parameters: a tile has a multiple of them.
constexpr int64_t column_unit(int64_t inner, int64_t vector) { return inner / std::gcd(inner, vector); }

// column_unit(plan.inner, vector) must be kMaxThreads at most. `line` is Args::line: 0, or what the width must be a
// multiple of, and vectors must divide. at_once: blocks that the device holds. sums: of each parameter, of sum_bytes
// each; where there are none they take no workspace.
inline ColumnsLaunch plan_columns(const Plan& plan, int64_t line, int vector, int unroll, int64_t at_once,
                                  int64_t workspace, int sums, int64_t sum_bytes) {
  ColumnsLaunch c{line ? columns_of(plan, 1, 1) : columns_of(plan, vector, kMinColumnVectors * vector), plan.count,
                  plan.inner};
  c.line = line ? line : c.columns.width;
  const int64_t rows = c.columns.rows + (c.columns.tail ? 1 : 0);
  c.slots = c.columns.fold * plan.count;
  const int64_t width = c.columns.width / vector;
  const int64_t unit = column_unit(plan.inner, vector);
  // As few rows to a block as give the device's threads enough, for a block has loads and sums of its own, and at most
  // as many as leave a warp's width. Their sums meet in shared memory, those of splits in the workspace. Few tiles are
  // made alike.
  constexpr int64_t kMostRows = kMaxThreads / kWarp;
  const int64_t for_device = std::max(at_once, kManyTiles * kMostRows) * kMaxThreads / width;
  // Half as many terms as a sum may have: of few, eager PyTorch's sums lose less.
  const int64_t for_sums = sums ? ceil_div(2 * rows, kMaxSerialSum) : 1;
  const int64_t enough = std::max(std::bit_floor(uint64_t(for_device)), std::bit_ceil(uint64_t(for_sums)));
  const int64_t at_a_time = std::min({ceil_div(rows, unroll), enough, kMostRows});
  const int64_t widest = kMaxThreads / unit * unit;
  const int64_t narrow = std::max<int64_t>(kMaxThreads / at_a_time / unit, 1) * unit;
  const int64_t tiles = std::max(ceil_div(width, widest), width / narrow);
  c.tx = static_cast<int>(tiles < kManyTiles ? round_up(ceil_div(width, tiles), unit) : narrow);
  c.tiles = ceil_div(width, c.tx);
  c.ty = static_cast<int>(std::clamp<int64_t>(ceil_div(rows, unroll), 1, kMaxThreads / c.tx));
  c.threads = static_cast<int>(round_up(int64_t{c.tx} * c.ty, kWarp));
  c.tile_folds = c.tiles == 1 ? static_cast<int>(c.columns.fold) : 1;
  c.period_parts = c.columns.fold / c.tile_folds;
  c.results = static_cast<int>(c.tx * vector / plan.inner / c.tile_folds);
  int shares = 1;
  while (shares < kWarp && 2 * shares * c.results * sums <= c.threads) shares *= 2;
  c.inner_shares = static_cast<int>(std::bit_floor(uint64_t(std::min<int64_t>(shares, plan.inner))));
  c.term_shares = shares / c.inner_shares;
  const int64_t steps = ceil_div(rows, int64_t{c.ty} * unroll);
  const int64_t for_accuracy = sums ? ceil_div(rows, c.ty * kMaxSerialSum) : 1;
  int64_t most = kMaxGridY;
  if (sums) most = std::clamp<int64_t>(workspace / (sums * sum_bytes * c.period_parts * c.count), 1, kMaxGridY);
  most = std::min(steps, most);
  const auto [splits, time] =
      splits_for(c.tiles, steps, 1, std::min(for_accuracy, most), most, at_once, sums ? c.period_parts : 0);
  c.splits = splits;
  c.rows = shares_of(c.columns.rows, c.splits * c.ty);
  c.time = time * c.tx * c.ty * unroll;
  return c;
}

// So a row has four vectors or more.
inline bool has_long_rows(const Plan& plan, int64_t element_bytes) {
  static_assert(kMinRowBytes >= 4 * 16);
  return plan.inner * element_bytes >= kMinRowBytes;
}

// Whether long rows may be columns. It pays where they are not whole vectors: as rows, each loads a vector that it
// shares with another, and stores its own part of it element by element. A tile must hold a parameter's columns.
inline bool may_be_columns(const Plan& plan, int vector) {
  return plan.inner % vector && column_unit(plan.inner, vector) <= kMaxThreads;
}

// Partial sums, [q][part][parameter]. Where there is one part they are whole: the gradients themselves, without a
// workspace.
struct PartialSums {
  int64_t sums, parts, count;
  bool whole;
  int64_t values;  // in the workspace
};

inline PartialSums partial_sums(int64_t sums, int64_t parts, int64_t count) {
  const bool whole = sums == 0 || parts == 1;
  return {sums, parts, count, whole, whole ? 0 : parts * sums * count};
}

// The finishing kernel, for each of the sums: kx parameters by ky shares of their partial sums in a block; both are
// powers of two.
struct FinishLaunch {
  PartialSums sums;
  int64_t grid;  // by as many as there are sums
  int kx, ky;
};

inline FinishLaunch plan_finish(const PartialSums& sums, int64_t at_once) {
  // A thread for each part, but of eight parameters or more, whose 32 bytes move at once.
  constexpr int kMinParameters = 8;
  int kx = kMaxThreads;
  while (kx > kMinParameters && kMaxThreads / kx < sums.parts) kx /= 2;
  while (kx > 1 && kx / 2 >= sums.count) kx /= 2;
  return {sums, std::min(ceil_div(sums.count, kx), at_once * kMaxWaves), kx, kMaxThreads / kx};
}

}  // namespace leaf_cuda::cuda
