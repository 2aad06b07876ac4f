// How a plan's elements are divided among blocks and threads. Host code alone, so that it is tested without a GPU.
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
// The rows and finishing kernels have at most this many waves of blocks; beyond that, a block takes several items.
constexpr int64_t kMaxWaves = 64;
// A thread adds at most this many terms in sequence: with more, float32 sums would be less exact than eager PyTorch's.
constexpr int64_t kMaxSerialSum = 64;
// Rows of at least this many bytes are read by adjacent threads without much waste; shorter ones are taken as columns.
constexpr int64_t kMinRowBytes = 64;
// A step over rows that are not whole vectors has about this many times the instructions and stores of another.
constexpr double kPartialRowsCost = 1.5;
// Minimum width, in vectors, of a matrix of folded periods: a narrower one would leave lanes of a warp idle.
constexpr int64_t kMinColumnVectors = 32;
// With at least this many tiles of columns, the last may be narrower than the others; fewer are made equally wide.
constexpr int64_t kManyTiles = 8;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Costs in units of a step: what a block does besides its steps, and the second kernel, which adds up partial sums.
constexpr double kOwnSteps = 2, kFinishSteps = 2;

// The number of shares to divide the steps of each item into, and the time that the pass then takes.
struct Splits {
  int64_t count;
  double time;
};

// Chooses the number of shares, from at_least to at_most, to divide the `steps` of each of `items` into: the one that
// takes the least time. Candidates are at_least, unless it is above 1 and makes less than a wave (the at_once blocks
// that the device holds), and the numbers that make up to kMaxTimes waves more. Time is counted in steps of one block,
// each at step_cost, of which the device does at_once at a time; a partial wave counts as half a wave or more, since
// half the blocks already have all of the memory's speed. parts: partial sums of a parameter per share, 0 where there
// are no sums.
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

// n items dealt out round-robin: each recipient gets `each`, and the first `over` of them one more.
struct Shares {
  int64_t each, over;
  LEAF_FUNCTION int64_t of(int64_t which) const { return each + (which < over); }
};
constexpr Shares shares_of(int64_t n, int64_t among) { return {n / among, n % among}; }

// Rows: each run of `inner` elements has one parameter. A block's item is one parameter k and one of `splits` shares of
// the vectors of k's `outer` rows. Vectors are aligned in memory, so a row's first and last may be partial.
struct RowsLaunch {
  int64_t outer, count, inner, pitch;
  bool aligned;     // every vector is whole
  int64_t vectors;  // slots for vectors in a row, of which the last may be empty
  Shares slots;     // of all rows of a parameter, dealt to splits·threads threads
  int64_t splits, items;
  // A thread's next slot is step_vectors vectors and `step` elements on; where that passes the row's end, it is in the
  // next row: `vectors` slots back and next_row elements on. Where not all vectors are whole, `step` and next_row lead
  // from the first element of one row to that of another.
  int64_t step_vectors, step, next_row;
  // Where the last row ends, and how many of its elements lie in a final partial vector. That vector is the last slot
  // of thread rest_thread of the last parameter, which processes it apart from its others; −1 if there is none.
  int64_t end, rest_thread;
  int rest;
  int64_t grid;
  int threads;
  double time;  // that of splits_for, in vectors instead of steps
};

// at_once: blocks that the device holds.
inline RowsLaunch plan_rows(const Plan& plan, int vector, int unroll, int64_t at_once, bool sums) {
  RowsLaunch r{plan.outer, plan.count, plan.inner, plan.pitch};
  // Modulo a vector, every row begins at a multiple of this.
  const int64_t begin = std::gcd(std::gcd(plan.inner, plan.pitch), vector);
  r.aligned = begin == vector;
  r.vectors = (plan.inner + 2 * vector - begin - 1) / vector;
  r.end = (r.outer - 1) * r.pitch + r.count * r.inner;
  r.rest = static_cast<int>(r.end % vector);
  const int64_t slots = r.outer * r.vectors;
  r.threads = static_cast<int>(std::clamp<int64_t>(round_up(ceil_div(slots, unroll), kWarp), kWarp, kMaxThreads));
  const int64_t steps = ceil_div(slots, int64_t{r.threads} * unroll);
  // A term is the sum over a step's vectors.
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
// at a time. A tile has all `inner` columns of each of its parameters, so that the block can sum over them; a tile as
// wide as the matrix also sums over the periods side by side.
struct ColumnsLaunch {
  Columns columns;
  int64_t count, inner;
  int64_t slots;  // parameters in a row of the matrix: fold·count
  int64_t line;   // for pitched operations: elements of an operand's line; divides the width
  int64_t tiles, splits;
  Shares rows;           // the matrix's whole rows, dealt to splits·ty rows of threads
  int64_t period_parts;  // periods side by side that are not added up in a block: one partial sum each
  int results;           // parameters whose sums a block computes
  int tile_folds;        // periods side by side that a block adds up
  // Threads that add up one sum, of terms (rows of threads and periods) by `inner` columns: term_shares by inner_shares
  // of them, powers of two.
  int term_shares, inner_shares;
  int tx, ty, threads;
  double time;             // as RowsLaunch::time
  bool parameter_vectors;  // a vector's parameters are contiguous and aligned, or a single one
};

// The fewest vectors that hold all columns of their parameters; a tile's width is a multiple of it.
constexpr int64_t column_unit(int64_t inner, int64_t vector) { return inner / std::gcd(inner, vector); }

// column_unit(plan.inner, vector) must be at most kMaxThreads. `line` is Args::line: 0, or a divisor of the width and a
// multiple of the vector. at_once: blocks that the device holds. sums: number of sums of each parameter, of sum_bytes
// each; without any, no workspace is taken.
inline ColumnsLaunch plan_columns(const Plan& plan, int64_t line, int vector, int unroll, int64_t at_once,
                                  int64_t workspace, int sums, int64_t sum_bytes) {
  ColumnsLaunch c{line ? columns_of(plan, 1, 1) : columns_of(plan, vector, kMinColumnVectors * vector), plan.count,
                  plan.inner};
  c.line = line ? line : c.columns.width;
  const int64_t rows = c.columns.rows + (c.columns.tail ? 1 : 0);
  c.slots = c.columns.fold * plan.count;
  const int64_t width = c.columns.width / vector;
  const int64_t unit = column_unit(plan.inner, vector);
  // A block takes as few rows at a time as give all of the device's threads work, since every block has loads and sums
  // of its own, and at most as many as leave its tile a warp wide. The rows' sums are added up in shared memory, those
  // of splits in the workspace. If tiles are few, they are equally wide.
  constexpr int64_t kMostRows = kMaxThreads / kWarp;
  const int64_t for_device = std::max(at_once, kManyTiles * kMostRows) * kMaxThreads / width;
  // At most half of kMaxSerialSum terms per thread: where terms are few, eager PyTorch's sums are more exact.
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

// Whether rows are long enough to be taken as rows: such a row has four vectors or more.
inline bool has_long_rows(const Plan& plan, int64_t element_bytes) {
  static_assert(kMinRowBytes >= 4 * 16);
  return plan.inner * element_bytes >= kMinRowBytes;
}

// Whether long rows may be taken as columns. That pays where they are not whole vectors: as rows, two neighbours both
// load the vector they share, and each stores its part element by element. A tile must hold all columns of a parameter.
inline bool may_be_columns(const Plan& plan, int vector) {
  return plan.inner % vector && column_unit(plan.inner, vector) <= kMaxThreads;
}

// Layout of the partial sums: [q][part][parameter], q the gradient. With only one part they are `whole`: the gradients
// themselves, without a workspace.
struct PartialSums {
  int64_t sums, parts, count;
  bool whole;
  int64_t values;  // number of them in the workspace
};

inline PartialSums partial_sums(int64_t sums, int64_t parts, int64_t count) {
  const bool whole = sums == 0 || parts == 1;
  return {sums, parts, count, whole, whole ? 0 : parts * sums * count};
}

// The finishing kernel: a block adds up the partial sums of kx parameters of one gradient, with ky threads for each
// parameter; both are powers of two.
struct FinishLaunch {
  PartialSums sums;
  int64_t grid;  // its x dimension; y is the number of sums
  int kx, ky;
};

inline FinishLaunch plan_finish(const PartialSums& sums, int64_t at_once) {
  // One thread per part if possible, but at least eight parameters side by side: 32 bytes in float32, one memory
  // sector.
  constexpr int kMinParameters = 8;
  int kx = kMaxThreads;
  while (kx > kMinParameters && kMaxThreads / kx < sums.parts) kx /= 2;
  while (kx > 1 && kx / 2 >= sums.count) kx /= 2;
  return {sums, std::min(ceil_div(sums.count, kx), at_once * kMaxWaves), kx, kMaxThreads / kx};
}

}  // namespace leaf_cuda::cuda
