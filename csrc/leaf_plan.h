// Every broadcast and layout question, answered once, for both backends.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace leaf_cuda {

// u in memory order, seen as (outer, count, inner): element i takes parameter (i / inner) % count.
//   per layer      (1, 1, N)
//   per channel    (N, C, H·W); channels_last (N·H·W, C, 1)
//   per element    (N, C·H·W, 1)
struct Plan {
  int64_t outer = 1, count = 1, inner = 1;
  // Elements from one outer index to the next: more than the period where the plan covers only some of the parameters.
  int64_t pitch = period();
  // Elements until the parameters repeat.
  constexpr int64_t period() const { return count * inner; }
  constexpr int64_t numel() const { return outer * period(); }
  // Where the plan's element i lies.
  constexpr int64_t at(int64_t i) const { return pitch == period() ? i : i / period() * pitch + i % period(); }
};

// Bytes that a pass may take beside its results.
constexpr int64_t workspace_limit(int64_t numel, int64_t element_bytes) {
  return std::max(numel * element_bytes / 8, int64_t{1} << 20);
}

// The same elements as a row-major matrix of `width` columns, each of which has one parameter: column c takes parameter
// (c / inner) % count. For an `inner` that is short or not whole vectors. Each row has `fold` periods side by side, so
// that the width is a multiple of a vector's whatever the count is; the last row may be partial. Periods with gaps
// between them are not folded.
struct Columns {
  int64_t fold, width;
  int64_t rows;    // whole rows
  int64_t tail;    // elements of the partial row after them, < width
  int64_t stride;  // from row to row
};

inline Columns columns_of(const Plan& plan, int64_t multiple, int64_t min_width) {
  const int64_t period = plan.period();
  if (plan.pitch != period) return {1, period, plan.outer, 0, plan.pitch};
  const int64_t least = multiple / std::gcd(period, multiple);
  const int64_t fold = least * ((min_width + least * period - 1) / (least * period));
  const int64_t width = fold * period;
  return {fold, width, plan.numel() / width, plan.numel() % width, width};
}

}  // namespace leaf_cuda
