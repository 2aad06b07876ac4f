// The CPU backend: chooses the loops for the processor and divides a plan's elements among threads.
//
// The division depends on the plan alone and partial sums are added in its order, so the gradients are bitwise the same
// for any number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <numeric>

#include "../leaf_ops.h"
#include "cpu_capability.h"
#include "leaf_loops.h"

namespace leaf_cuda::cpu {
namespace {

// Below this length a segment is not worth its own set-up (nor its four partial sums): the columns serve, whose set-up
// is for all rows. So, if rows are many, is a longer one that would end within a vector.
constexpr int64_t kMinSegment = 128, kMinCutSegment = 224;
bool by_segments(const Plan& plan) {
  const bool cut = plan.inner % kColumnMultiple != 0;
  return plan.inner >= (cut ? std::clamp(32 * plan.outer, kMinSegment, kMinCutSegment) : kMinSegment);
}
constexpr int64_t kMinColumns = 64;
// From so many columns on, a vector cut short at the end of each row costs less than folding rows.
constexpr int64_t kUnfoldedColumns = 1024;
// What one task of a parallel loop works on at least: far beyond the cost of handing it out. A recurrent step's
// elements take several times as long as others.
template <class Op>
constexpr int64_t kTaskElements = Op::sets < 3 ? 32768
                                  : Op::sums   ? 4096
                                               : 8192;
// Outputs of more bytes than this would leave the last-level cache again before they are all there.
constexpr int64_t kBeyondCaches = int64_t{32} << 20;
// Rows share their partial sums: at least so many, for the sums to stay under an eighth of u; and so that there are
// about so many tasks.
constexpr int64_t kMinRowsPerChunk = 128;
constexpr int64_t kTasks = 128;

const InnerLoopsByOperation& loops_for(at::ScalarType dtype) {
  static const InnerLoopsByType& table = []() -> const InnerLoopsByType& {
    switch (cpu_capability()) {
#if defined(__x86_64__)
      case CpuCapability::avx512:
        return kLoopsAvx512;
      case CpuCapability::avx2:
        return kLoopsAvx2;
#endif
      default:
        return kLoopsBaseline;
    }
  }();
  switch (dtype) {
    case at::kDouble:
      return table.float64;
    case at::kFloat:
      return table.float32;
    case at::kBFloat16:
      return table.bfloat16;
    default:
      return table.float16;
  }
}

// f(q, p, strides) for each of an operation's `sets` of parameters, p of its own type; p points to a zero where there
// is none.
template <int sets, class F>
void for_each_parameter(const ParameterArgs& parameters, F f) {
  dispatch_dtype(parameters.dtype, [&](auto zero) {
    using P = decltype(zero);
    for (int q = 0; q < 4 * sets; ++q)
      f(q, parameters.p[q] ? static_cast<const P*>(parameters.p[q]) : &zero, parameters.strides[q]);
  });
}

// The matrix, or one row of it all where the tensor's rows follow one another as its columns do.
ParameterMatrix matrix_of(const ParameterMatrix& matrix, const ParameterStrides& strides) {
  if (strides.row == matrix.columns * strides.column) return {1, matrix.rows * matrix.columns};
  return matrix;
}

// The n parameters from `first` on, behind the last the first again, in runs of which a tensor has the values as near
// to one another as can be: f(k, size, step, values, stride) of the k-th, (k + step)-th, ... of them, `size` in all,
// which the tensor has at values[0], values[stride], ... The matrix is the tensor's own.
template <class P, class F>
void for_each_run(P* values, const ParameterMatrix& matrix, const ParameterStrides& strides, int64_t first, int64_t n,
                  F f) {
  constexpr int64_t kMinRun = 8;  // measured: shorter ones across the rows cost more than values that lie apart
  const bool across = matrix.rows > 1 && strides.row < strides.column && n >= kMinRun * matrix.columns;
  const int64_t step = across ? matrix.columns : 1, stride = across ? strides.row : strides.column;
  // Short runs far from one another: the processor does not foresee them.
  constexpr int64_t kAhead = 8, kLine = kVectorBytes / sizeof(P);
  ParameterIndex of_begin = matrix.at(first % (matrix.rows * matrix.columns));
  for (int64_t begin = 0; begin < std::min(n, step); ++begin, matrix.advance(of_begin)) {
    ParameterIndex index = of_begin;
    for (int64_t k = begin, size; k < n; k += size * step) {
      const int64_t left = across ? matrix.rows - index.row : matrix.columns - index.column;
      size = std::min((n - k + step - 1) / step, left);
      P* const run = values + strides.at(index);
      if (across) {
        const auto ahead = reinterpret_cast<uintptr_t>(run) + kAhead * strides.column * sizeof(P);
        for (int64_t j = 0; j < size + kLine; j += kLine)  // perhaps of no element: an address, no pointer
          __builtin_prefetch(reinterpret_cast<const void*>(ahead + j * stride * sizeof(P)));
      }
      f(k, size, step, run, stride);
      // A run ends before n at the end of its row, or column.
      index = across ? ParameterIndex{0, index.column} : ParameterIndex{(index.row + 1) % matrix.rows, 0};
    }
  }
}

// to[0], to[to_stride], ... = the n values from[0], from[from_stride], ...
template <class To, class From>
void convert(To* to, int64_t to_stride, const From* from, int64_t from_stride, int64_t n) {
  if (to_stride == 1 && from_stride == 1)
    std::transform(from, from + n, to, [](const From& value) { return static_cast<To>(value); });
  else
    for (int64_t j = 0; j < n; ++j) to[j * to_stride] = static_cast<To>(from[j * from_stride]);
}

// The parameters of `count` segments one after another, the first of which takes the parameters k: out[4·sets·segment].
template <int sets>
void segment_parameters(const ParameterArgs& parameters, int64_t k, int64_t count, double* out) {
  for_each_parameter<sets>(parameters, [&](int q, const auto* p, const ParameterStrides& strides) {
    for_each_run(p, matrix_of(parameters.matrix, strides), strides, k, count,
                 [&](int64_t to, int64_t size, int64_t step, auto* from, int64_t stride) {
                   convert(out + 4 * sets * to + q, 4 * sets * step, from, stride, size);
                 });
  });
}

// The parameters of the columns from `first` on, the first of a parameter's own, on to the next multiple of
// kColumnMultiple, in the arithmetic type T: where they lie, or in a buffer.
template <class T, int sets, int64_t kBlock>
class ColumnParameters {
 public:
  ColumnParameters(const ParameterArgs& parameters, const Plan& plan, int64_t fold, int64_t first, int64_t columns) {
    const int64_t padded = (columns + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple;
    const int64_t k = first / plan.inner % plan.count;
    for_each_parameter<sets>(parameters, [&](int q, const auto* p, const ParameterStrides& strides) {
      const ParameterMatrix matrix = matrix_of(parameters.matrix, strides);
      const ParameterIndex index = matrix.at(k);
      p_[q] = buffer_[q];
      if constexpr (std::is_same_v<decltype(p), const T*>)
        if (plan.inner == 1 && fold == 1 && strides.column == 1 && index.column + padded <= matrix.columns) {
          p_[q] = p + strides.at(index);
          return;
        }
      T* const out = buffer_[q];
      if (!strides.row && !strides.column) {
        std::fill_n(out, padded, static_cast<T>(*p));
        return;
      }
      const int64_t n = (padded + plan.inner - 1) / plan.inner;
      for_each_run(p, matrix, strides, k, n, [&](int64_t to, int64_t size, int64_t step, auto* from, int64_t stride) {
        convert(out + to, step, from, stride, size);
      });
      if (plan.inner > 1)  // each for its columns, from the last, so that none is written over
        for (int64_t j = n; j-- > 0;)
          std::fill(out + j * plan.inner, out + std::min(padded, (j + 1) * plan.inner), T(out[j]));
    });
  }

  operator const void* const*() const { return p_; }

 private:
  const void* p_[4 * sets];
  alignas(kVectorBytes) T buffer_[4 * sets][kBlock];
};

// In double; many by eight sums that do not wait for one another.
template <class T>
double sum_of(const T* values, int64_t n) {
  double sum = 0;
  if (n >= 16) {
    double sums[8] = {};
    for (; n >= 8; n -= 8, values += 8)
      for (int k = 0; k < 8; ++k) sums[k] += values[k];
    sum = std::accumulate(sums, sums + 8, 0.0);
  }
  return std::accumulate(values, values + n, sum);
}

// The operands at element i of a plan whose rows (of a block of columns, say) are `row` elements long.
template <class Op>
Operands operands_at(const Args& a, int64_t i, int64_t row) {
  const int64_t bytes = static_cast<int64_t>(c10::elementSize(a.dtype));
  const auto offset = [&](int64_t pitch) { return a.line ? i / a.line * pitch + i % a.line : i; };
  const auto row_pitch = [&](int64_t pitch) { return a.line ? row / a.line * pitch : row; };
  Operands at;
  for (int k = 0; k < Op::inputs; ++k) {
    at.in[k] = static_cast<const char*>(a.in[k]) + bytes * a.in_stride[k] * offset(a.in_pitch[k]);
    at.in_stride[k] = a.in_stride[k];
    at.in_row[k] = row_pitch(a.in_pitch[k]);
  }
  for (int k = 0; k < Op::outputs; ++k) {
    at.out[k] = a.out[k] ? static_cast<char*>(a.out[k]) + bytes * offset(a.out_pitch[k]) : nullptr;
    at.out_row[k] = row_pitch(a.out_pitch[k]);
  }
  return at;
}

// u in memory order, cut into chunks of equal length and where the parameters change.
struct Segments {
  static constexpr int64_t chunk = kTaskElements<Forward>, most = chunk / kMinSegment + 2;  // of a chunk
  int64_t inner, numel;

  explicit Segments(const Plan& plan) : inner(plan.inner), numel(plan.numel()) {}

  int64_t tasks() const { return (numel + chunk - 1) / chunk; }

  // A row is a run of `inner` elements (row = outer index · count + parameter index); row r's segment in chunk c has
  // the number r + c: unique, since from one segment to the next r or c grows, and within a chunk one after another.
  int64_t segments() const { return numel / inner + tasks(); }

  // f(segment, row, first element, length)
  template <class F>
  void for_each(int64_t c, F f) const {
    const int64_t end = std::min(numel, (c + 1) * chunk);
    for (int64_t i = c * chunk, row = i / inner; i < end; ++row) {
      const int64_t next = std::min(end, (row + 1) * inner);
      f(row + c, row, i, next - i);
      i = next;
    }
  }

  // f(segment) for the segments of one row
  template <class F>
  void for_row(int64_t row, F f) const {
    static_assert((chunk & (chunk - 1)) == 0);  // so that these are shifts
    const uint64_t begin = row * inner, last = begin + inner - 1;
    for (uint64_t c = begin / chunk; c <= last / chunk; ++c) f(row + static_cast<int64_t>(c));
  }
};

// Columns (leaf_plan.h) as blocks of columns × chunks of rows; the partial last row is a chunk of its own. A block lies
// within one of the operands' lines (Args::line).
struct ColumnBlocks {
  Columns columns;
  int64_t inner, line, block, blocks_in_line, blocks, rows_per_chunk, chunks;

  // Blocks of `most` columns at most, tasks of task_elements at least.
  ColumnBlocks(const Args& a, int64_t most, int64_t task_elements) : inner(a.plan.inner) {
    const bool fold = a.line == 0 && a.plan.period() < kUnfoldedColumns;
    columns = columns_of(a.plan, fold ? kColumnMultiple : 1, fold ? kMinColumns : 1);
    line = a.line ? a.line : columns.width;
    block = std::min(line, most / inner * inner);  // whole parameters
    blocks_in_line = (line + block - 1) / block;
    blocks = columns.width / line * blocks_in_line;
    const int64_t wanted = std::max<int64_t>(1, kTasks / blocks);
    rows_per_chunk = std::max({task_elements / block, (columns.rows + wanted - 1) / wanted, kMinRowsPerChunk});
    chunks = (columns.rows + rows_per_chunk - 1) / rows_per_chunk + (columns.tail ? 1 : 0);
  }

  int64_t tasks() const { return blocks * chunks; }

  // f(chunk, first column, columns, first element, rows)
  template <class F>
  void for_task(int64_t task, F f) const {
    const int64_t chunk = task / blocks, within = task % blocks_in_line * block;
    const int64_t c0 = task % blocks / blocks_in_line * line + within;
    const bool tail = columns.tail && chunk == chunks - 1;
    const int64_t r0 = tail ? columns.rows : chunk * rows_per_chunk;
    const int64_t rows = tail ? 1 : std::min(rows_per_chunk, columns.rows - r0);
    const int64_t n = std::min(block, tail ? columns.tail - c0 : line - within);
    if (n > 0) f(chunk, c0, n, r0 * columns.stride + c0, rows);
  }
};

// f(task) for each of `tasks` equal shares of numel elements. A thread is not woken for less than kTaskElements<Op>.
template <class Op, class F>
void parallel_tasks(int64_t tasks, int64_t numel, bool stream, F f) {
  const int64_t grain = std::max<int64_t>(1, kTaskElements<Op> * tasks / numel);
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task);
#if defined(__x86_64__)
    if (stream) _mm_sfence();  // once for all tasks: each waits until what was stored has left the processor
#endif
  });
}

bool beyond_caches(const Plan& plan, at::ScalarType dtype) {
  return plan.numel() * static_cast<int64_t>(c10::elementSize(dtype)) > kBeyondCaches;
}

// Parameter first + k has the gradients sums[q·stride + k], k < n.
template <class Op, class T>
void write_gradients(const Args& a, int64_t first, int64_t n, const T* sums, int64_t stride) {
  dispatch_dtype(a.dp_dtype, [&](auto zero) {
    using P = decltype(zero);
    for (int q = 0; q < Op::sums; ++q) {
      if (!a.dp[q]) continue;
      const T* const from = sums + q * stride;
      for_each_run(static_cast<P*>(a.dp[q]), matrix_of(a.parameters.matrix, a.dp_strides[q]), a.dp_strides[q], first, n,
                   [&](int64_t k, int64_t size, int64_t step, P* to, int64_t to_stride) {
                     convert(to, to_stride, from + k, step, size);
                   });
    }
  });
}

// Parameters whose partial sums are added up side by side.
constexpr int64_t kFinished = 256;

// Writes the gradients of all parameters: add(first, n, sums) adds the partial sums of n of them, in the plan's order,
// to sums[q·kFinished + k].
template <class Op, class F>
void finish(const Args& a, F add) {
  for (int64_t first = 0; first < a.plan.count; first += kFinished) {
    const int64_t n = std::min(kFinished, a.plan.count - first);
    double sums[kSums<Op> * kFinished] = {};
    add(first, n, sums);
    write_gradients<Op>(a, first, n, sums, kFinished);
  }
}

template <class T>
Tensor make_workspace(at::IntArrayRef sizes, const Tensor& like) {
  return at::empty(sizes, like.options().dtype(c10::CppTypeToScalarType<T>::value));
}

template <class Op, class T>
void run_segments(const Args& a, const InnerLoops& loops, const Tensor& like) {
  const Segments segments(a.plan);
  const bool stream = beyond_caches(a.plan, a.dtype);
  const Tensor workspace = Op::sums ? make_workspace<T>({segments.segments(), Op::sums}, like) : Tensor();
  T* const partial = Op::sums ? workspace.mutable_data_ptr<T>() : nullptr;
  parallel_tasks<Op>(segments.tasks(), a.plan.numel(), stream, [&](int64_t task) {
    Segment of_task[Segments::most];
    double p[Segments::most * 4 * Op::sets], sums[Segments::most * kSums<Op>];
    const int64_t begin = a.plan.at(task * Segments::chunk);
    int64_t first = 0, row = 0, count = 0;
    segments.for_each(task, [&](int64_t segment, int64_t of_row, int64_t i, int64_t n) {
      if (count == 0) first = segment, row = of_row;
      const int64_t at = a.plan.at(i) - begin;
      of_task[count++] = {at, at + n};
    });
    segment_parameters<Op::sets>(a.parameters, row % a.plan.count, count, p);
    loops.segments(operands_at<Op>(a, begin, 0), of_task, count, p, stream, sums);
    std::copy_n(sums, Op::sums * count, partial + Op::sums * first);
  });
  if (!Op::sums) return;
  finish<Op>(a, [&](int64_t first, int64_t n, double* sums) {
    for (int64_t o = 0; o < a.plan.outer; ++o)
      for (int64_t k = 0; k < n; ++k)
        segments.for_row(o * a.plan.count + first + k, [&](int64_t segment) {
          for (int q = 0; q < Op::sums; ++q) sums[q * kFinished + k] += partial[segment * Op::sums + q];
        });
  });
}

// The most columns of a block. Where a recurrent step has too few rows to share, its columns are shared.
template <class Op>
int64_t most_columns(const Plan& plan) {
  if (!Op::always_pitched || plan.outer >= kMinRowsPerChunk) return kColumnBlock<Op>;
  return std::clamp(kTaskElements<Op> / plan.outer / kColumnMultiple * kColumnMultiple, kMinColumns, kColumnBlock<Op>);
}

template <class Op, class T>
void run_columns(const Args& a, const InnerLoops& loops, const Tensor& like) {
  const ColumnBlocks blocks(a, most_columns<Op>(a.plan), kTaskElements<Op>);
  const bool stream = beyond_caches(a.plan, a.dtype);
  const int64_t count = a.plan.count, inner = a.plan.inner, fold = blocks.columns.fold, slots = fold * count;
  // Sums over a chunk's rows and the `inner` columns of a parameter: [chunk][q][fold][count]. Where a task has whole
  // sums, it writes the gradients.
  const bool direct = !Op::sums || (blocks.chunks == 1 && fold == 1);
  const Tensor workspace = direct ? Tensor() : make_workspace<T>({blocks.chunks, Op::sums, slots}, like);
  T* const partial = direct ? nullptr : workspace.mutable_data_ptr<T>();
  if (blocks.columns.tail && !direct)
    std::fill_n(partial + (blocks.chunks - 1) * Op::sums * slots, Op::sums * slots, T(0));
  parallel_tasks<Op>(blocks.tasks(), a.plan.numel(), stream, [&](int64_t task) {
    blocks.for_task(task, [&](int64_t chunk, int64_t c0, int64_t n, int64_t i, int64_t rows) {
      const ColumnParameters<T, Op::sets, kColumnBlock<Op>> p(a.parameters, a.plan, fold, c0, n);
      alignas(kVectorBytes) T sums[kSums<Op> * kSumStride<Op>];
      loops.columns(operands_at<Op>(a, i, blocks.columns.stride), rows, blocks.columns.stride, n, p, stream, sums);
      if (!Op::sums) return;
      const int64_t first = c0 / inner, complete = (n + inner - 1) / inner;
      if (inner > 1)
        for (int q = 0; q < Op::sums; ++q)
          for (int64_t k = 0; k < complete; ++k) {
            const T* const begin = sums + q * kSumStride<Op> + k * inner;
            sums[q * kSumStride<Op> + k] = static_cast<T>(sum_of(begin, std::min(inner, n - k * inner)));
          }
      if (direct) return write_gradients<Op>(a, first, complete, sums, kSumStride<Op>);
      for (int q = 0; q < Op::sums; ++q)
        std::copy_n(sums + q * kSumStride<Op>, complete, partial + (chunk * Op::sums + q) * slots + first);
    });
  });
  if (direct) return;
  finish<Op>(a, [&](int64_t first, int64_t n, double* sums) {
    for (int64_t chunk = 0; chunk < blocks.chunks; ++chunk)
      for (int q = 0; q < Op::sums; ++q)
        for (int64_t f = 0; f < fold; ++f) {
          const T* const part = partial + (chunk * Op::sums + q) * slots + f * count + first;
          for (int64_t k = 0; k < n; ++k) sums[q * kFinished + k] += part[k];
        }
  });
}

void run(const Args& a, const Tensor& like) {
  const InnerLoops& loops = loops_for(a.dtype)[a.operation];
  dispatch_operation(a.operation, [&](auto operation) {
    using Op = decltype(operation);
    if constexpr (!Op::always_pitched)
      if (by_segments(a.plan)) {  // so it has no runs
        (a.dtype == at::kDouble ? run_segments<Op, double> : run_segments<Op, float>)(a, loops, like);
        return;
      }
    (a.dtype == at::kDouble ? run_columns<Op, double> : run_columns<Op, float>)(a, loops, like);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(leaf_cuda, CPU, library) {
  if (is_unregistered(c10::DispatchKey::CPU)) implement_operators<run>(library);
}

}  // namespace leaf_cuda::cpu
