// The CUDA kernels and their planner against a plain loop, in the emulation. Meant for the address and undefined
// behaviour sanitizers: buffers are exactly as long as they should be, and what a kernel must write starts as NaN.
//
// -DLEAF_STORAGE=double, float, c10::BFloat16 or c10::Half: one program each, so that they compile in parallel.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/leaf_launch.cuh"
#include "buffer.h"
#include "cuda_emulation.h"
#include "memory_trace.h"

using namespace leaf_cuda;
using namespace leaf_cuda::cuda;
using cuda_emulation::MemoryTrace;
using cuda_emulation::Schedule;

namespace {

int passed = 0, failed = 0;
bool stop_at_first_failure = false, print_plans = false;

void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (ok) return;
  std::printf("FAILED %s\n", what.c_str());
  if (stop_at_first_failure) std::exit(1);
}

// The tensors' type and the parameters': the same, or float beside bfloat16.
using S = LEAF_STORAGE;
using P = std::conditional_t<std::is_same_v<S, c10::BFloat16>, float, S>;
constexpr c10::ScalarType kStorage = c10::CppTypeToScalarType<S>::value;
constexpr c10::ScalarType kParameter = c10::CppTypeToScalarType<P>::value;

struct Case {
  Plan plan;
  int64_t offset = 0;  // of u, in elements: 1 makes the kernels take single elements
  int grad_stride = 1;
  int64_t shared_parameter = -1;  // this one has a single value
  bool p2_and_p4 = true;
  bool want_du = true;
  int64_t multiprocessors = 2;
  // For the gated unit and cells: elements between an operand's lines, -1 for dense ones; number of lines in `count`.
  int64_t gap = -1, lines = 1;
  int64_t parameter_offset = 0;
  // Number of rows in the parameters' and gradients' matrix, and elements between them, -1 for a transposed matrix.
  // Parameter 0 has only one value per row.
  int64_t parameter_rows = 1, parameter_gap = -1;

  ParameterMatrix matrix() const { return {parameter_rows, plan.count / parameter_rows}; }
  ParameterStrides strides(int q) const {
    const auto [rows, columns] = matrix();
    if (q == shared_parameter) return {0, 0};
    if (q == 0 && rows > 1) return {1, 0};
    return gradient_strides();
  }
  ParameterStrides gradient_strides() const {
    const auto [rows, columns] = matrix();
    if (rows == 1) return {0, 1};
    return parameter_gap < 0 ? ParameterStrides{1, rows} : ParameterStrides{columns + parameter_gap, 1};
  }
  int64_t parameter_extent() const { return plan.count + std::max<int64_t>(parameter_gap, 0) * parameter_rows; }
};

std::string name(const Case& c, const char* what) {
  char text[300];
  std::snprintf(text, sizeof(text),
                "%s %s (%ld, %ld, %ld) pitch %ld offset %ld grad stride %d shared %ld p2p4 %d du %d mp %ld gap %ld "
                "lines %ld parameter offset %ld rows %ld gap %ld",
                what, c10::toString(kStorage), long(c.plan.outer), long(c.plan.count), long(c.plan.inner),
                long(c.plan.pitch), long(c.offset), c.grad_stride, long(c.shared_parameter), c.p2_and_p4, c.want_du,
                long(c.multiprocessors), long(c.gap), long(c.lines), long(c.parameter_offset), long(c.parameter_rows),
                long(c.parameter_gap));
  return text;
}

const Schedule kSchedules[] = {{Schedule::ascending, Schedule::ascending, 0},
                               {Schedule::descending, Schedule::descending, 0},
                               {Schedule::shuffled, Schedule::shuffled, 1},
                               {Schedule::shuffled, Schedule::shuffled, 2}};

// trace may be null.
auto launcher(const Schedule& schedule, MemoryTrace* trace) {
  return [&schedule, trace](auto kernel, dim3 grid, int threads, size_t shared, const auto&... args) {
    const auto launch = [&] { cuda_emulation::launch(schedule, kernel, grid, dim3(threads), shared, args...); };
    trace ? trace->of_launch(launch) : launch();
  };
}

// Whether |got − want| is at most `ulps` times T's epsilon, on the scale of the terms that made it, plus float16's
// smallest subnormal.
template <class T>
bool close(T got, double want, double scale, double ulps) {
  const double smallest = std::is_same_v<T, c10::Half> ? 0x1p-24 : 0;
  return std::abs(static_cast<double>(got) - want) <= ulps * std::numeric_limits<T>::epsilon() * scale + smallest;
}

// The expected values of an output or a gradient, and for each the scale of the terms that made it.
struct Expected {
  std::vector<double> value, scale;
  explicit Expected(int64_t n) : value(n), scale(n) {}
  void add(int64_t i, double share, double its_scale) {
    value[i] += share;
    scale[i] += its_scale;
  }
};

int inputs_of(Operation operation) {
  int inputs = 0;
  Operations::dispatch(operation, [&](auto op) { inputs = op.inputs; });
  return inputs;
}

// Watches what a pass moves: its inputs, its outputs, and its sums.
void watch(MemoryTrace& trace, const Args& a, size_t outputs, const std::vector<Buffer<P>>& dp,
           const Buffer<char>& workspace) {
  const auto operand = [&](const void* begin, int64_t pitch) {
    const int64_t last = a.plan.numel() - 1;
    const int64_t last_at = a.line ? last / a.line * pitch + last % a.line : a.plan.at(last);
    return trace.watch(begin, begin ? last_at + 1 : 0, sizeof(S));
  };
  for (int k = 0; k < inputs_of(a.operation); ++k)
    a.in_stride[k] ? operand(a.in[k], a.in_pitch[k]) : trace.watch(a.in[k], 1, sizeof(S));
  for (size_t k = 0; k < outputs; ++k) operand(a.out[k], a.out_pitch[k]);
  for (const auto& d : dp) trace.watch(d.data, d.n, sizeof(P));
  trace.watch(workspace.data, workspace.n / sizeof(Arithmetic<S>), sizeof(Arithmetic<S>));
}

// Checks that a pass reads each input and writes each output exactly once. But where rows are not whole vectors, a
// vector that two of them share may be read for each.
template <class F>
void check_traffic(const MemoryTrace& trace, const Args& a, const LaunchPlan& plan, size_t outputs, const F& named) {
  const int inputs = inputs_of(a.operation);
  const int64_t bytes = a.plan.numel() * sizeof(S), slots = a.plan.outer * a.plan.count * plan.rows.vectors;
  const int64_t most = plan.by_rows && !plan.rows.aligned ? slots * 16 : bytes;
  for (int k = 0; k < inputs; ++k) {
    const auto& moved = trace.of(k);
    const bool is_read = a.in_stride[k] == 0 || (moved.read.bytes >= bytes && moved.read.bytes <= most);
    check(is_read && moved.write.bytes == 0, named(("bytes of input " + std::to_string(k)).c_str()));
  }
  for (size_t k = 0; k < outputs; ++k) {
    const auto& moved = trace.of(inputs + k);
    check(moved.write.bytes == (a.out[k] ? bytes : 0) && moved.read.bytes == 0,
          named(("bytes of output " + std::to_string(k)).c_str()));
  }
}

// Runs one operation in every schedule: all must give the same bits, and the expected values.
void run_operation(const Case& c, Args args, std::vector<Buffer<S>>& out, std::vector<Buffer<P>>& dp,
                   const std::vector<Expected>& expected_out, const std::vector<Expected>& expected_dp, double ulps) {
  const char* names[] = {"forward",      "backward",      "double backward", "glu forward", "glu backward",
                         "lstm forward", "lstm backward", "gru forward",     "gru backward"};
  const std::string what = std::string(names[static_cast<int>(args.operation)]) + " ";
  const auto named = [&](const char* detail) { return name(c, (what + detail).c_str()); };
  const auto at = [&](size_t k, int64_t i) {
    return args.line ? i / args.line * args.out_pitch[k] + i % args.line : c.plan.at(i);
  };
  for (size_t k = 0; k < out.size(); ++k) args.out[k] = out[k].data;
  for (size_t q = 0; q < dp.size(); ++q) {
    args.dp[q] = args.parameters.p[q] ? dp[q].data : nullptr;
    args.dp_strides[q] = c.gradient_strides();
  }
  args.dp_dtype = kParameter;
  if (!dp.empty() && !c.want_du) args.out[0] = nullptr;

  std::vector<std::vector<char>> first;
  for (const Schedule& schedule : kSchedules) {
    for (auto& o : out) o.poison();
    for (auto& d : dp) d.poison();
    try {
      const LaunchPlan plan = plan_launch<S>(args, c.multiprocessors);
      check(plan.workspace_bytes <= args.workspace, named("workspace"));
      Buffer<char> workspace(plan.workspace_bytes);
      MemoryTrace trace;
      const bool traced = cuda_emulation::is_traced && first.empty();
      if (traced) watch(trace, args, out.size(), dp, workspace);
      launch<S>(args, plan, workspace.data, launcher(schedule, traced ? &trace : nullptr));
      if (traced) check_traffic(trace, args, plan, out.size(), named);
    } catch (const std::exception& error) {
      return check(false, named(error.what()));
    }
    std::vector<std::vector<char>> bits;
    for (const auto& o : out) bits.push_back(o.bits());
    for (const auto& d : dp) bits.push_back(d.bits());
    if (first.empty()) first = bits;
    check(bits == first, named("same bits in every schedule"));
  }

  for (size_t k = 0; k < out.size(); ++k) {
    if (!args.out[k]) continue;
    bool ok = true;
    std::vector<bool> written(out[k].n);
    for (int64_t i = 0; i < c.plan.numel(); ++i) {
      written[at(k, i)] = true;
      ok = ok && close(out[k].data[at(k, i)], expected_out[k].value[i], expected_out[k].scale[i], ulps);
    }
    check(ok, named(("output " + std::to_string(k)).c_str()));
    for (int64_t i = 0; i < out[k].n; ++i) ok = ok && (written[i] || std::isnan(static_cast<double>(out[k].data[i])));
    check(ok, named(("gaps of output " + std::to_string(k)).c_str()));
  }
  for (size_t q = 0; q < dp.size(); ++q) {
    bool ok = true;
    std::vector<bool> written(dp[q].n);
    for (int64_t k = 0; args.dp[q] && k < c.plan.count; ++k) {
      const int64_t at = args.dp_strides[q].at(args.parameters.matrix.at(k));
      written[at] = true;
      ok = ok && close(dp[q].data[at], expected_dp[q].value[k], expected_dp[q].scale[k], 2 * ulps);
    }
    check(ok, named(("gradient " + std::to_string(q)).c_str()));
    for (int64_t i = 0; i < dp[q].n; ++i) ok = ok && (written[i] || std::isnan(static_cast<double>(dp[q].data[i])));
    check(ok, named(("gaps of gradient " + std::to_string(q)).c_str()));
  }
}

void run(const Case& c) {
  std::mt19937_64 random(c.plan.numel() * 31 + c.offset);
  const int64_t n = c.plan.numel(), extent = c.plan.at(n - 1) + 1, count = c.plan.count;
  Buffer<S> u(extent, c.offset), grad(c.grad_stride ? extent : 1), v(extent);
  for (auto* b : {&u, &grad, &v}) b->fill(random);
  std::vector<Buffer<P>> p, dp;
  Args args{};
  args.plan = c.plan;
  args.dtype = kStorage;
  args.workspace = workspace_limit(c.plan.numel(), sizeof(S));
  args.parameters.dtype = kParameter;
  args.parameters.matrix = c.matrix();
  for (int q = 0; q < 8; ++q) {
    p.emplace_back(q == c.shared_parameter ? 1 : c.parameter_extent(), c.parameter_offset);
    p[q].fill(random);
    if (q % 2 == 1 && !c.p2_and_p4) continue;
    args.parameters.p[q] = p[q].data;
    args.parameters.strides[q] = c.strides(q);
  }
  const void* in[] = {u.data, grad.data, v.data};
  const int strides[] = {1, c.grad_stride, 1};
  std::copy_n(in, 3, args.in);
  std::copy_n(strides, 3, args.in_stride);

  // The plain loops, in double.
  Expected y(n), du(n), dgrad(n), ddu(n);
  std::vector<Expected> sums(4, Expected(count)), double_sums(3, Expected(count));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t k = i / c.plan.inner % count;
    const auto value = [&](int q) {
      const P* const own = static_cast<const P*>(args.parameters.p[q]);
      return own ? static_cast<double>(own[args.parameters.strides[q].at(args.parameters.matrix.at(k))]) : 0.0;
    };
    const double x = static_cast<double>(u.data[c.plan.at(i)]);
    const double g = static_cast<double>(grad.data[c.plan.at(i) * c.grad_stride]);
    const double z = value(2) * x, s = 1 / (1 + std::exp(-z)), t = 1 / (1 + std::exp(z)), l = value(0) * x + value(1);
    const double l_abs = std::abs(value(0) * x) + std::abs(value(1)), condition = 1 + std::abs(z);
    y.add(i, l * s + value(3), l_abs * s * condition + std::abs(value(3)));
    du.add(i, g * (value(0) * s + l * s * t * value(2)),
           std::abs(g) * (std::abs(value(0) * s) + l_abs * s * t * std::abs(value(2))) * condition);
    const double shares[4] = {g * x * s, g * s, g * l * s * t * x, g};
    const double scales[4] = {std::abs(shares[0]), std::abs(shares[1]), std::abs(g * l_abs * s * t * x), std::abs(g)};
    for (int q = 0; q < 4; ++q) sums[q].add(k, shares[q], scales[q] * condition);

    // Double backward: y's derivative along (v, v1, ..., v4), and g times that one's with respect to u, p1, p2, p3.
    const double w = static_cast<double>(v.data[c.plan.at(i)]), v1 = value(4), v2 = value(5), v3 = value(6),
                 v4 = value(7);
    const double p1 = value(0), p3 = value(2), s1 = s * t, s2 = s * t * (t - s);
    const double dl = p1 * w + v1 * x + v2, dz = p3 * w + v3 * x;
    const double dl_abs = std::abs(p1 * w) + std::abs(v1 * x) + std::abs(v2);
    const double dz_abs = std::abs(p3 * w) + std::abs(v3 * x), s2_abs = s1;
    dgrad.add(i, dl * s + l * s1 * dz + v4, (dl_abs * s + l_abs * s1 * dz_abs) * condition + std::abs(v4));
    ddu.add(i, g * (v1 * s + dl * s1 * p3 + p1 * s1 * dz + l * s2 * p3 * dz + l * s1 * v3),
            std::abs(g) * condition *
                (std::abs(v1) * s + dl_abs * s1 * std::abs(p3) + std::abs(p1) * s1 * dz_abs +
                 l_abs * s2_abs * std::abs(p3) * dz_abs + l_abs * s1 * std::abs(v3)));
    const double second[3] = {g * (w * s + x * s1 * dz), g * s1 * dz, g * (dl * s1 * x + l * s2 * dz * x + l * s1 * w)};
    const double second_scales[3] = {std::abs(w) * s + std::abs(x) * s1 * dz_abs, s1 * dz_abs,
                                     (dl_abs * s1 + l_abs * s2_abs * dz_abs) * std::abs(x) + l_abs * s1 * std::abs(w)};
    for (int q = 0; q < 3; ++q) double_sums[q].add(k, second[q], std::abs(g) * second_scales[q] * condition);
  }

  const auto buffers = [&](auto& list, int how_many, int64_t length) {
    list.clear();
    for (int k = 0; k < how_many; ++k) list.emplace_back(length);
  };
  std::vector<Buffer<S>> out;
  buffers(out, 1, extent);
  args.operation = Operation::forward;
  run_operation(c, args, out, dp, {y}, {}, 4);
  buffers(dp, 4, c.parameter_extent());
  args.operation = Operation::backward;
  run_operation(c, args, out, dp, {du}, sums, 8);
  buffers(out, 2, extent);
  buffers(dp, 3, c.parameter_extent());
  args.operation = Operation::double_backward;
  run_operation(c, args, out, dp, {dgrad, ddu}, double_sums, 8);
}

// The gated unit, with operands dense or in lines, each with its own gap between lines.
void run_glu(const Case& c) {
  std::mt19937_64 random(c.plan.numel() * 17 + c.gap);
  const int64_t n = c.plan.numel(), count = c.plan.count;
  Args args{};
  args.plan = c.plan;
  args.dtype = kStorage;
  args.workspace = workspace_limit(c.plan.numel(), sizeof(S));
  args.parameters.dtype = kParameter;
  args.parameters.matrix = c.matrix();
  args.line = c.gap < 0 ? 0 : count / c.lines;
  // Each operand has its own pitch: a whole number of vectors if the line and the gap together are.
  const auto pitch = [&](int k) { return args.line + c.gap + 16 * k; };
  const auto at = [&](int k, int64_t i) { return args.line ? i / args.line * pitch(k) + i % args.line : i; };
  std::vector<Buffer<S>> in;
  std::vector<Buffer<P>> p, dp;
  for (int k = 0; k < 3; ++k) {
    in.emplace_back(at(k, n - 1) + 1, c.offset);
    in[k].fill(random);
    args.in[k] = in[k].data;
    args.in_stride[k] = 1;
    args.in_pitch[k] = pitch(k);
  }
  for (int q = 0; q < 4; ++q) {
    p.emplace_back(q == c.shared_parameter ? 1 : count);
    p[q].fill(random);
    if (q % 2 == 1 && !c.p2_and_p4) continue;
    args.parameters.p[q] = p[q].data;
    args.parameters.strides[q] = c.strides(q);
  }
  Expected y(n), da(n), db(n);
  std::vector<Expected> sums(4, Expected(count));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t k = i / c.plan.inner % count;
    const auto value = [&](int q) {
      const P* const own = static_cast<const P*>(args.parameters.p[q]);
      return own ? static_cast<double>(own[args.parameters.strides[q].at(args.parameters.matrix.at(k))]) : 0.0;
    };
    const auto input = [&](int which) { return static_cast<double>(in[which].data[at(which, i)]); };
    const double x = input(0), b = input(1), grad = input(2), g = grad * b, p1 = value(0), p3 = value(2), p4 = value(3);
    const double z = p3 * x, s = 1 / (1 + std::exp(-z)), slope = s / (1 + std::exp(z)), l = p1 * x + value(1);
    const double l_abs = std::abs(p1 * x) + std::abs(value(1)), condition = 1 + std::abs(z);
    const double y_abs = l_abs * s * condition + std::abs(p4);
    y.add(i, (l * s + p4) * b, y_abs * std::abs(b));
    da.add(i, g * (p1 * s + l * slope * p3),
           std::abs(g) * (std::abs(p1) * s + l_abs * slope * std::abs(p3)) * condition);
    db.add(i, grad * (l * s + p4), y_abs * std::abs(grad));
    const double shares[4] = {g * x * s, g * s, g * l * slope * x, g};
    for (int q = 0; q < 4; ++q)
      sums[q].add(k, shares[q], (q == 2 ? std::abs(g * x) * l_abs * slope : std::abs(shares[q])) * condition);
  }
  std::vector<Buffer<S>> out;
  const auto add_output = [&](int k) {
    args.out_pitch[k] = pitch(k + 1);
    out.emplace_back(at(k + 1, n - 1) + 1, c.offset);
  };
  add_output(0);
  args.operation = Operation::glu_forward;
  run_operation(c, args, out, dp, {y}, {}, 4);
  add_output(1);
  for (int q = 0; q < 4; ++q) dp.emplace_back(count);
  args.operation = Operation::glu_backward;
  run_operation(c, args, out, dp, {da, db}, sums, 8);
}

// y = leaf(u) in double, and its derivatives with respect to u and to p1, ..., p4.
struct Activation {
  double y, u, by[4];

  Activation(double x, const double* p) {
    const double s = 1 / (1 + std::exp(-p[2] * x)), slope = s / (1 + std::exp(p[2] * x)), l = p[0] * x + p[1];
    y = l * s + p[3];
    u = p[0] * s + l * slope * p[2];
    by[0] = x * s, by[1] = s, by[2] = l * slope * x, by[3] = 1;
  }
};

// A step of an LSTM or a GRU, each operand in lines with its own gap between them. Values are of magnitude 1 or so, and
// errors are measured against 1 plus the value's magnitude.
void run_cell(bool lstm, const Case& c) {
  std::mt19937_64 random(c.plan.numel() * 13 + c.gap + lstm);
  const int64_t n = c.plan.numel(), count = c.plan.count;
  const int sets = lstm ? 5 : 3, inputs = lstm ? 7 : 6;
  Args args{};
  args.plan = c.plan;
  args.dtype = kStorage;
  args.workspace = workspace_limit(c.plan.numel(), sizeof(S));
  args.parameters.dtype = kParameter;
  args.parameters.matrix = c.matrix();
  args.line = count;
  const auto pitch = [&](int k) { return count + c.gap + 16 * k; };
  const auto at = [&](int k, int64_t i) { return i / count * pitch(k) + i % count; };
  const auto fill = [&](auto& buffer) {
    buffer.fill(random);
    for (int64_t i = 0; i < buffer.n; ++i) buffer.data[i] = buffer.data[i] / 4;
  };
  std::vector<Buffer<S>> in, out;
  std::vector<Buffer<P>> p, dp;
  for (int k = 0; k < inputs; ++k) {
    in.emplace_back(at(k, n - 1) + 1, c.offset);
    fill(in[k]);
    args.in[k] = in[k].data;
    args.in_stride[k] = 1;
    args.in_pitch[k] = pitch(k);
  }
  for (int q = 0; q < 4 * sets; ++q) {
    p.emplace_back(q == c.shared_parameter ? 1 : count);
    fill(p[q]);
    args.parameters.p[q] = p[q].data;
    args.parameters.strides[q] = c.strides(q);
  }
  std::vector<Expected> forward(lstm ? 2 : 1, Expected(n)), backward(5, Expected(n)), sums(4 * sets, Expected(count));
  for (int64_t i = 0; i < n; ++i) {
    double x[7], own[5][4];
    for (int k = 0; k < inputs; ++k) x[k] = static_cast<double>(in[k].data[at(k, i)]);
    for (int q = 0; q < 4 * sets; ++q)
      own[q / 4][q % 4] = static_cast<double>(p[q].data[i % count * args.parameters.strides[q].column]);
    const auto set = [&](std::vector<Expected>& results, int k, double value) {
      results[k].add(i, value, 1 + std::abs(value));
    };
    const auto add = [&](int of_set, const Activation& a, double grad) {
      for (int q = 0; q < 4; ++q) sums[4 * of_set + q].add(i % count, grad * a.by[q], 1 + std::abs(grad * a.by[q]));
      return grad * a.u;
    };
    const Activation a(x[0], own[0]), b(x[1], own[1]);
    if (lstm) {
      const Activation g(x[2], own[2]), o(x[3], own[3]);
      const double cell = b.y * x[4] + a.y * g.y;
      const Activation t(cell, own[4]);
      set(forward, 0, o.y * t.y);
      set(forward, 1, cell);
      const double dcell = x[6] + add(4, t, x[5] * o.y);
      set(backward, 0, add(0, a, dcell * g.y));
      set(backward, 1, add(1, b, dcell * x[4]));
      set(backward, 2, add(2, g, dcell * a.y));
      set(backward, 3, add(3, o, x[5] * t.y));
      set(backward, 4, dcell * b.y);
    } else {
      const Activation m(x[2] + a.y * x[3], own[2]);
      set(forward, 0, (1 - b.y) * m.y + b.y * x[4]);
      const double du = add(2, m, x[5] * (1 - b.y));
      set(backward, 0, add(0, a, du * x[3]));
      set(backward, 1, add(1, b, x[5] * (x[4] - m.y)));
      set(backward, 2, du);
      set(backward, 3, du * a.y);
      set(backward, 4, x[5] * b.y);
    }
  }
  const double ulps = sizeof(S) > 2 ? 32 : 2;
  const auto outputs = [&](size_t how_many) {
    for (size_t k = out.size(); k < how_many; ++k) {
      args.out_pitch[k] = pitch(k + 1);
      out.emplace_back(at(k + 1, n - 1) + 1, c.offset);
    }
  };
  outputs(forward.size());
  args.operation = lstm ? Operation::lstm_forward : Operation::gru_forward;
  run_operation(c, args, out, dp, forward, {}, ulps);
  outputs(5);
  for (int q = 0; q < 4 * sets; ++q) dp.emplace_back(count);
  args.operation = lstm ? Operation::lstm_backward : Operation::gru_backward;
  run_operation(c, args, out, dp, backward, sums, ulps);
}

void cell_plans() {
  const auto run = [](const Case& c) {
    run_cell(true, c);
    run_cell(false, c);
  };
  for (const Plan& plan : {Plan{1, 1, 1}, Plan{3, 7, 1}, Plan{2, 33, 1}, Plan{20, 32, 1}, Plan{70, 5, 1},
                           Plan{3, 300, 1}, Plan{200, 40, 1}})
    for (int64_t gap : {0, 5}) {
      Case c{plan};
      c.gap = gap;
      run(c);
      c.multiprocessors = 132;
      c.shared_parameter = 9;
      c.offset = 1;
      c.want_du = gap == 0;
      run(c);
    }
}

void glu_plans() {
  for (int64_t n = 1; n <= 17; ++n) {
    run_glu({{1, 1, n}});
    run_glu({{3, 5, 64 + n}});
    run_glu({{3, n, 1}});
    for (int64_t gap : {int64_t{0}, int64_t{1}, (31 - n) % 16 + 1}) {  // the last: a pitch of whole vectors
      Case c{{3, n, 1}};
      c.gap = gap;
      run_glu(c);
      c.plan = {21, 32 + n, 1};
      run_glu(c);
      c.plan = {5, 3 * n, 1};
      c.lines = 3;
      run_glu(c);
    }
  }
  for (const Plan& plan : {Plan{64, 256, 1}, Plan{300, 40, 1}, Plan{2, 700, 1}, Plan{3, 5000, 1}, Plan{40, 1, 1}})
    for (int64_t multiprocessors : {1, 132})
      for (int64_t gap : {-1, 0, 3, 16}) {
        Case c{plan};
        c.multiprocessors = multiprocessors;
        c.gap = gap;
        run_glu(c);
        if (plan.count % 4 == 0) c.lines = 4;
        c.shared_parameter = 2;
        c.p2_and_p4 = c.want_du = false;
        c.offset = 1;
        run_glu(c);
      }
}

void small_plans() {
  // Tails: 0 ... 2·(widest vector) + 1 elements over a whole number of vectors, in rows and in columns.
  for (int64_t n = 1; n <= 17; ++n) {
    run({{1, 1, n}});
    run({{1, 1, 128 + n}});
    run({{3, 5, 64 + n}});
    run({{3, n, 1}});
    run({{40, 32 + n, 1}});
    run({{5, 3, n}});
  }
  for (int64_t offset : {1, 3})
    for (const Plan& plan : {Plan{1, 1, 1000}, Plan{3, 5, 67}, Plan{33, 40, 1}, Plan{9, 7, 4}}) run({plan, offset});
  {
    Case c{{33, 40, 1}};
    c.parameter_offset = 1;
    run(c);
  }
  // Matrices of parameters with rows of 10, 8, 16, 5 and 3, whole vectors and not, in columns and in rows.
  for (const Plan& plan : {Plan{33, 40, 1}, Plan{20, 64, 1}, Plan{150, 80, 1}, Plan{60, 15, 2}, Plan{3, 6, 80}})
    for (int64_t gap : {-1, 0, 1, 8})
      for (int64_t multiprocessors : {1, 132}) {
        Case c{plan};
        c.parameter_rows = plan.count == 40   ? 4
                           : plan.count == 64 ? 8
                           : plan.count == 80 ? 5
                           : plan.count == 15 ? 3
                                              : 2;
        c.parameter_gap = gap;
        c.multiprocessors = multiprocessors;
        run(c);
        c.shared_parameter = 2;
        c.want_du = c.p2_and_p4 = false;
        run(c);
      }
  // Plans with gaps, of whole vectors and not.
  for (int64_t gap : {1, 8, 16})
    for (const Plan& plan : {Plan{3, 5, 1}, Plan{5, 32, 1}, Plan{7, 600, 1}, Plan{4, 9, 4}, Plan{3, 5, 64},
                             Plan{2, 3, 131}, Plan{3, 2, 256}}) {
      Case c{plan};
      c.plan.pitch += gap;
      run(c);
      c.multiprocessors = 132;
      c.grad_stride = 0;
      run(c);
    }
  for (const Plan& plan : {Plan{1, 1, 5000}, Plan{7, 3, 196}, Plan{300, 33, 1}, Plan{64, 10, 9}, Plan{2, 700, 1},
                           Plan{1, 70, 40}, Plan{1000, 3, 1}, Plan{1, 600, 1}, Plan{256, 67, 1}, Plan{5, 300, 70},
                           Plan{3, 5000, 1}, Plan{9, 4, 510}, Plan{3, 2, 301}})
    for (int64_t multiprocessors : {1, 5, 132}) {
      Case c{plan};
      c.multiprocessors = multiprocessors;
      run(c);
      c.grad_stride = 0;
      run(c);
      c.shared_parameter = 2;
      c.p2_and_p4 = false;
      run(c);
      c.want_du = false;
      run(c);
    }
  // Rows that are not whole vectors, and that would make too many partial sums as columns.
  run({{1, 8193, 33}});
}

// Index arithmetic beyond 2^31, by planning alone.
void large_plans() {
  const int64_t big = (int64_t{1} << 31) + 17;
  for (const Plan& plan : {Plan{1, 1, big}, Plan{big, 3, 64}, Plan{5, big, 100}, Plan{3, 7, big}}) {
    constexpr int N = 8;
    const RowsLaunch r = plan_rows(plan, N, 2, 264, true);
    const std::string what = "rows " + std::to_string(plan.outer) + " " + std::to_string(plan.count);
    check(r.grid >= 1 && r.grid <= 264 * kMaxWaves && r.threads % kWarp == 0, what + " grid");
    const int64_t threads = r.splits * r.threads, last = plan.outer * r.vectors - 1;
    check(r.slots.of(last % threads) == last / threads + 1, what + " slots");
    const auto check_step = [&](auto aligned) {
      for (int64_t slot : {int64_t{0}, last - threads}) {
        using Cursor = RowCursor<N, decltype(aligned)::value>;
        Cursor from(r, plan.count - 1, slot);
        from.advance();
        const Cursor to(r, plan.count - 1, slot + threads);
        check(from.at == to.at && from.vector == to.vector, what + " step");
      }
    };
    r.aligned ? check_step(std::true_type{}) : check_step(std::false_type{});
    int64_t most = 0;  // vectors that a row may span
    for (int64_t k = 0; k < N; ++k) most = std::max(most, ceil_div(k * plan.inner % N + plan.inner, N));
    check(r.vectors == most, what + " vectors");
    check(ceil_div(r.outer * r.vectors, r.splits * r.threads * 2) <= kMaxSerialSum, what + " steps");
    check(4 * 4 * r.splits * r.count <= workspace_limit(plan.numel(), 2), what + " workspace");
    // The last element is the last one of a slot of the last row; if its vector is partial, it is that slot's thread
    // that has the rest.
    check(r.end == plan.numel() && r.rest == r.end % N, what + " rest");
    bool found = false;
    for (int64_t slot = last - 2; slot <= last; ++slot) {
      const auto at = RowCursor<N, false>(r, plan.count - 1, slot).slot();
      const int64_t end = at.first + std::min(N, N + at.shift);
      const bool empty = at.shift == N;
      check(at.first % N == 0 && at.first >= 0 && (empty ? at.first + N <= r.end : end <= r.end), what + " slot");
      if (empty || end != r.end) continue;
      found = true;
      check(r.rest_thread == (r.rest ? slot % threads : -1), what + " thread of the rest");
    }
    check(found, what + " last element");
  }
  for (const Plan& plan : {Plan{big, 3, 1}, Plan{3, big, 1}, Plan{big, 1000, 7}}) {
    constexpr int N = 8;
    const ColumnsLaunch c = plan_columns(plan, 0, N, 2, 264, workspace_limit(plan.numel(), 2), 4, 4);
    const std::string what = "columns " + std::to_string(plan.outer) + " " + std::to_string(plan.count);
    constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;
    check(c.tiles >= 1 && c.tiles <= kMaxGridX && c.splits >= 1 && c.splits <= kMaxGridY, what + " grid");
    check(c.threads <= kMaxThreads && c.tx * c.ty <= c.threads, what + " threads");
    check(c.columns.width * c.columns.rows + c.columns.tail == plan.numel(), what + " elements");
    check(c.tiles * c.tx * N >= c.columns.width && c.columns.width % N == 0, what + " tiles");
    check(c.tx * N % plan.inner == 0, what + " whole parameters in a tile");
  }
}

void print(const Plan& plan, const LaunchPlan& b) {
  std::printf("(%ld, %ld, %ld) %s: %ld blocks, %ld bytes of partial sums, added up by %ld loads in sequence\n",
              long(plan.outer), long(plan.count), long(plan.inner), c10::toString(kStorage),
              long(b.by_rows ? b.rows.grid : b.columns.tiles * b.columns.splits), long(b.workspace_bytes),
              b.workspace_bytes ? long(ceil_div(b.sums.parts, b.finish.ky)) : 0);
}

// Arguments to plan with, but not to run. Sums are wanted.
Args arguments(Operation operation, const Plan& plan) {
  Args a{};
  a.operation = operation;
  a.dtype = kStorage;
  a.plan = plan;
  a.in_stride[0] = a.in_stride[1] = 1;
  a.dp[0] = &a;
  a.workspace = workspace_limit(plan.numel(), sizeof(S));
  return a;
}

// What the planner promises for passes large enough for a device of 132 multiprocessors, except in double.
void plans_of_a_large_device() {
  if (sizeof(S) == 8) return;
  constexpr int64_t multiprocessors = 132;
  for (const Plan& plan : {Plan{1, 1, 1 << 24}, Plan{256, 64, 4096}, Plan{1024, 64, 49}, Plan{64, 65536, 1},
                           Plan{256, 65536, 1}, Plan{32, 1 << 20, 1}, Plan{4096, 1024, 1}, Plan{16384, 1024, 1},
                           Plan{1 << 20, 64, 1}, Plan{1 << 20, 5, 1}, Plan{1 << 20, 3, 7}, Plan{1 << 15, 1001, 1},
                           Plan{256, 2048, 49}, Plan{256, 1024, 196}, Plan{128, 256, 169}, Plan{64, 64, 1020}})
    for (Operation operation : {Operation::forward, Operation::backward}) {
      Args a = arguments(operation, plan);
      const LaunchPlan b = plan_launch<S>(a, multiprocessors);
      const RowsLaunch& r = b.rows;
      const ColumnsLaunch& c = b.columns;
      const std::string what = std::to_string(plan.outer) + " " + std::to_string(plan.count) + " " +
                               std::to_string(plan.inner) + (operation == Operation::forward ? " forward" : "");
      const auto at_most = [&](int64_t got, int64_t most, const char* of) {
        check(got <= most, what + " has " + std::to_string(got) + " " + of);
      };
      check(b.vector, what + " by vectors");
      at_most(-(b.by_rows ? r.grid : c.tiles * c.splits), -multiprocessors, "blocks, negative");
      if (!b.by_rows) at_most(c.tiles * c.splits, 8 * multiprocessors, "blocks");
      if (operation == Operation::forward) {
        a.workspace = 0;
        const LaunchPlan without = plan_launch<S>(a, multiprocessors);
        check(without.vector && without.columns.splits == c.splits, what + " whatever the workspace");
        continue;
      }
      check(b.workspace_bytes <= a.workspace, what + " workspace");
      if (print_plans) print(plan, b);
      // Terms that a thread adds in sequence: over its steps or rows, in the block, and in the finishing kernel.
      if (b.by_rows) {
        const int at_once = unroll<Backward, S>(b.vector);
        at_most(ceil_div(plan.outer * r.vectors, r.splits * r.threads * at_once), kMaxSerialSum, "steps");
      } else {
        at_most(ceil_div(c.columns.rows, c.splits * c.ty), kMaxSerialSum, "rows");
        at_most(ceil_div(c.ty * c.tile_folds, c.term_shares) * ceil_div(c.inner, c.inner_shares), kMaxSerialSum,
                "terms");
      }
      at_most(ceil_div(b.sums.parts, b.finish.ky), 32, "partial sums");
    }
  // Without sums only the device bounds the shares: they make one wave or a few, nearly full.
  for (const Plan& plan : {Plan{1, 1, 1 << 28}, Plan{1 << 15, 4096, 1}}) {
    const LaunchPlan b = plan_launch<S>(arguments(Operation::forward, plan), multiprocessors);
    const int64_t blocks = b.by_rows ? b.rows.grid : b.columns.tiles * b.columns.splits;
    const int64_t left = (blocks + multiprocessors / 8) % multiprocessors;
    check(left <= multiprocessors / 4, std::to_string(plan.outer) + " " + std::to_string(blocks) + " blocks forward");
  }
  // As many columns as the device has threads need no second kernel, and neither do small passes.
  for (const Plan& plan : {Plan{64, 65536, 1}, Plan{256, 65536, 1}, Plan{256, 1 << 18, 1}, Plan{16, 64, 1},
                           Plan{16, 5, 1}, Plan{1, 1, 1000}}) {
    const LaunchPlan b = plan_launch<S>(arguments(Operation::backward, plan), multiprocessors);
    check(b.sums.whole, std::to_string(plan.outer) + " rows in one kernel");
    if (print_plans) print(plan, b);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const auto has = [&](const char* option) {
    return std::any_of(argv + 1, argv + argc, [&](const char* given) { return std::strcmp(given, option) == 0; });
  };
  stop_at_first_failure = has("--stop-at-first-failure");
  if (has("--plans")) {  // prints those of backward for 132 multiprocessors, and does nothing else
    print_plans = true;
    plans_of_a_large_device();
    return 0;
  }
  large_plans();  // quick: planning alone
  plans_of_a_large_device();
  small_plans();
  glu_plans();
  cell_plans();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
