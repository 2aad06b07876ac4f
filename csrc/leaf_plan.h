// Every broadcast and layout question, answered once, for both backends.
#pragma once

#include <cstdint>
#include <numeric>

namespace leaf_cuda {

// u in memory order, seen as (outer, count, inner): element i takes parameter (i / inner) % count.
//   per layer      (1, 1, N)
//   per channel    (N, C, H·W); channels_last (N·H·W, C, 1)
//   per element    (N, C·H·W, 1)
struct Plan {
  int64_t outer = 1, count = 1, inner = 1;
  constexpr int64_t numel() const { return outer * count * inner; }
};

// The same elements as a matrix whose columns keep one parameter each, for a short `inner`: row-major, `width` columns,
// column c takes parameter (c / inner) % count. `fold` rows of count·inner elements side by side make one row of the
// matrix, so that its width is a multiple of a vector's whatever the count is; the last row may be partial.
struct Columns {
  int64_t fold, width;
  int64_t rows;  // whole rows
  int64_t tail;  // elements of the partial row after them, < width
};

inline Columns columns_of(const Plan& plan, int64_t multiple, int64_t min_width) {
  const int64_t period = plan.count * plan.inner;
  const int64_t least = multiple / std::gcd(period, multiple);
  const int64_t fold = least * ((min_width + least * period - 1) / (least * period));
  const int64_t width = fold * period;
  return {fold, width, plan.numel() / width, plan.numel() % width};
}

}  // namespace leaf_cuda
