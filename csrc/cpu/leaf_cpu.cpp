// The CPU backend: chooses the inner loops for the processor and divides a plan's elements among threads.
//
// The division depends on the plan alone, and partial sums are added in the plan's order. So the gradients are bitwise
// the same for any number of threads.
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

// The shortest runs (plan.inner elements with the same parameters) that are computed as segments, each with a set-up
// and partial sums of its own. Shorter ones are computed as columns, which are set up once for all rows. Runs that end
// within a vector must be longer the more rows there are, up to kMinCutSegment.
constexpr int64_t kMinSegment = 128, kMinCutSegment = 224;
bool by_segments(const Plan& plan) {
  const bool cut = plan.inner % kColumnMultiple != 0;
  return plan.inner >= (cut ? std::clamp(32 * plan.outer, kMinSegment, kMinCutSegment) : kMinSegment);
}
constexpr int64_t kMinColumns = 64;
// From this number of columns on, a partial vector at the end of each row costs less than folding rows.
constexpr int64_t kUnfoldedColumns = 1024;
// The least number of elements for a task of a parallel loop: enough to far outweigh the cost of scheduling it. In a
// recurrent step (three or more sets of parameters) an element takes several times as long as in others, and the
// threads are still awake from its matrix product.
template <class Op>
constexpr int64_t kTaskElements = Op::sets < 3 ? 32768
                                  : Op::sums   ? 1024
                                               : 2048;
// Outputs of more bytes than this are streamed past the caches: the last-level cache would evict them before the last
// element is written.
constexpr int64_t kBeyondCaches = int64_t{32} << 20;
// A chunk of rows shares its partial sums. It has at least kMinRowsPerChunk rows, so that all partial sums take less
// than an eighth of u's memory, and more if there would otherwise be more than about kTasks tasks.
constexpr int64_t kMinRowsPerChunk = 128;
constexpr int64_t kTasks = 128;
// A recurrent step has about as many tasks, unless these would have fewer than kTaskElements, or more than
// kMostTaskElements.
constexpr int64_t kStepTasks = 8;
template <class Op>
constexpr int64_t kMostTaskElements = 8 * kTaskElements<Op>;

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

// Calls f(q, p, strides) for each parameter q of an operation's `sets` sets. p points to the parameter's values in
// their own dtype, or to a zero if the parameter is missing.
template <int sets, class F>
void for_each_parameter(const ParameterArgs& parameters, F f) {
  dispatch_dtype(parameters.dtype, [&](auto zero) {
    using P = decltype(zero);
    for (int q = 0; q < 4 * sets; ++q)
      f(q, parameters.p[q] ? static_cast<const P*>(parameters.p[q]) : &zero, parameters.strides[q]);
  });
}

// The matrix for a tensor with these strides, as a single row if its rows follow one another as its columns do.
ParameterMatrix matrix_of(const ParameterMatrix& matrix, const ParameterStrides& strides) {
  if (strides.row == matrix.columns * strides.column) return {1, matrix.rows * matrix.columns};
  return matrix;
}

// Visits n parameters from `first` on (the last is followed by the first) in runs whose values lie as close together in
// a tensor as possible. f(k, size, step, values, stride) gets a run of `size` of them: the k-th, (k + step)-th, ... of
// the n, whose values are values[0], values[stride], ... `matrix` is the tensor's own (matrix_of).
template <class P, class F>
void for_each_run(P* values, const ParameterMatrix& matrix, const ParameterStrides& strides, int64_t first, int64_t n,
                  F f) {
  constexpr int64_t kMinRun = 8;  // measured: shorter runs across the rows cost more than values that lie apart
  const bool across = matrix.rows > 1 && strides.row < strides.column && n >= kMinRun * matrix.columns;
  const int64_t step = across ? matrix.columns : 1, stride = across ? strides.row : strides.column;
  // These runs are short and far apart, so the hardware prefetcher does not follow them.
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
        for (int64_t j = 0; j < size + kLine; j += kLine)  // may lie outside the tensor: an integer, not a pointer
          __builtin_prefetch(reinterpret_cast<const void*>(ahead + j * stride * sizeof(P)));
      }
      f(k, size, step, run, stride);
      // A run that ends before n has reached the end of its row (of its column, if across rows).
      index = across ? ParameterIndex{0, index.column} : ParameterIndex{(index.row + 1) % matrix.rows, 0};
    }
  }
}

// to[j·to_stride] = from[j·from_stride] for j < n, converted to To.
template <class To, class From>
void convert(To* to, int64_t to_stride, const From* from, int64_t from_stride, int64_t n) {
  if (to_stride == 1 && from_stride == 1)
    std::transform(from, from + n, to, [](const From& value) { return static_cast<To>(value); });
  else
    for (int64_t j = 0; j < n; ++j) to[j * to_stride] = static_cast<To>(from[j * from_stride]);
}

// Writes the parameters of `count` consecutive segments, the first of which takes the k-th parameters: those of segment
// s to out[4·sets·s], ...
template <int sets>
void segment_parameters(const ParameterArgs& parameters, int64_t k, int64_t count, double* out) {
  for_each_parameter<sets>(parameters, [&](int q, const auto* p, const ParameterStrides& strides) {
    for_each_run(p, matrix_of(parameters.matrix, strides), strides, k, count,
                 [&](int64_t to, int64_t size, int64_t step, auto* from, int64_t stride) {
                   convert(out + 4 * sets * to + q, 4 * sets * step, from, stride, size);
                 });
  });
}

// The parameters of `columns` columns from `first` on, padded to a multiple of kColumnMultiple, in the arithmetic type
// T: read where they lie if possible, else copied to a buffer. `first` is the first column of its parameter.
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
      if (plan.inner > 1)  // repeat each for its columns, from the last, so that none is overwritten too early
        for (int64_t j = n; j-- > 0;)
          std::fill(out + j * plan.inner, out + std::min(padded, (j + 1) * plan.inner), T(out[j]));
    });
  }

  operator const void* const*() const { return p_; }

 private:
  const void* p_[4 * sets];
  alignas(kVectorBytes) T buffer_[4 * sets][kBlock];
};

// The sum of n values, in double. Many are added in eight independent sums, which do not wait for one another.
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

// The operands at the plan's element i, where the rows of a block of columns are `row` elements apart.
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

// u in memory order, cut into chunks of equal length, and these into segments where the parameters change.
struct Segments {
  static constexpr int64_t chunk = kTaskElements<Forward>, most = chunk / kMinSegment + 2;  // in a chunk
  int64_t inner, numel;

  explicit Segments(const Plan& plan) : inner(plan.inner), numel(plan.numel()) {}

  int64_t tasks() const { return (numel + chunk - 1) / chunk; }

  // A row is a run of `inner` elements (row = outer index · count + parameter index). Row r's segment in chunk c has
  // the number r + c: unique, since r or c grows from each segment to the next, and consecutive within a chunk.
  int64_t segments() const { return numel / inner + tasks(); }

  // Calls f(segment, row, first element, length) for each segment of chunk c.
  template <class F>
  void for_each(int64_t c, F f) const {
    const int64_t end = std::min(numel, (c + 1) * chunk);
    for (int64_t i = c * chunk, row = i / inner; i < end; ++row) {
      const int64_t next = std::min(end, (row + 1) * inner);
      f(row + c, row, i, next - i);
      i = next;
    }
  }

  // Calls f(segment) for each segment of a row.
  template <class F>
  void for_row(int64_t row, F f) const {
    static_assert((chunk & (chunk - 1)) == 0);  // so that the divisions are shifts
    const uint64_t begin = row * inner, last = begin + inner - 1;
    for (uint64_t c = begin / chunk; c <= last / chunk; ++c) f(row + static_cast<int64_t>(c));
  }
};

// Columns (leaf_plan.h) divided into blocks of columns × chunks of rows; the partial last row is a chunk of its own. A
// block lies within one of the operands' lines (Args::line).
struct ColumnBlocks {
  Columns columns;
  int64_t inner, line, block, blocks_in_line, blocks, rows_per_chunk, chunks;

  // Blocks have at most `most` columns, tasks about task_elements elements or more.
  ColumnBlocks(const Args& a, int64_t most, int64_t task_elements) : inner(a.plan.inner) {
    const bool fold = a.line == 0 && a.plan.period() < kUnfoldedColumns;
    columns = columns_of(a.plan, fold ? kColumnMultiple : 1, fold ? kMinColumns : 1);
    line = a.line ? a.line : columns.width;
    block = std::min(line, most / inner * inner);  // all `inner` columns of a parameter
    blocks_in_line = (line + block - 1) / block;
    blocks = columns.width / line * blocks_in_line;
    const int64_t wanted = std::max<int64_t>(1, kTasks / blocks);
    rows_per_chunk = std::max({task_elements / block, (columns.rows + wanted - 1) / wanted, kMinRowsPerChunk});
    chunks = (columns.rows + rows_per_chunk - 1) / rows_per_chunk + (columns.tail ? 1 : 0);
  }

  int64_t tasks() const { return blocks * chunks; }

  // Calls f(chunk, first column, number of columns, first element, number of rows), unless the task is empty.
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

// Calls f(task), in parallel, for each of `tasks` tasks that share numel elements equally. The grain size is
// kTaskElements<Op> elements: no thread is woken for fewer.
template <class Op, class F>
void parallel_tasks(int64_t tasks, int64_t numel, bool stream, F f) {
  const int64_t grain = std::max<int64_t>(1, kTaskElements<Op> * tasks / numel);
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task);
#if defined(__x86_64__)
    if (stream) _mm_sfence();  // once per thread: a fence waits until all stores have left the processor
#endif
  });
}

bool beyond_caches(const Plan& plan, at::ScalarType dtype) {
  return plan.numel() * static_cast<int64_t>(c10::elementSize(dtype)) > kBeyondCaches;
}

// Writes the gradients of n parameters: sums[q·stride + k] is dp_q of parameter first + k.
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

// Number of parameters whose partial sums are added up side by side.
constexpr int64_t kFinished = 256;

// Writes the gradients of all parameters. add(first, n, sums) must add the partial sums of parameter first + k, k < n,
// in the plan's order, to sums[q·kFinished + k].
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

// The largest number of columns in a block. Those of a recurrent step, which has few rows, are narrower if there would
// otherwise be too few tasks.
template <class Op>
int64_t most_columns(const Plan& plan) {
  if (!Op::always_pitched) return kColumnBlock<Op>;
  const int64_t elements = std::clamp(plan.numel() / kStepTasks, kTaskElements<Op>, kMostTaskElements<Op>);
  const int64_t columns = elements / std::min(plan.outer, kMinRowsPerChunk) / kColumnMultiple * kColumnMultiple;
  return std::clamp(columns, kColumnMultiple, kColumnBlock<Op>);
}

template <class Op, class T>
void run_columns(const Args& a, const InnerLoops& loops, const Tensor& like) {
  const ColumnBlocks blocks(a, most_columns<Op>(a.plan), kTaskElements<Op>);
  const bool stream = beyond_caches(a.plan, a.dtype);
  const int64_t count = a.plan.count, inner = a.plan.inner, fold = blocks.columns.fold, slots = fold * count;
  // Partial sums, each over a chunk's rows and a parameter's `inner` columns: [chunk][q][fold][count]. If each task's
  // sums are complete (`direct`), it writes the gradients itself.
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
  Operations::dispatch(a.operation, [&](auto operation) {
    using Op = decltype(operation);
    if constexpr (!Op::always_pitched)
      if (by_segments(a.plan)) {  // then inner > 1, so there are no lines (Args::line)
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
