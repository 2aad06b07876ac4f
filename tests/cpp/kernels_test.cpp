// The CUDA kernels and their planner against a plain loop, by the emulation. Meant for the address and undefined
// behaviour sanitizers: buffers are exactly as long as they should be, and what a kernel must write is NaN before.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/leaf_launch.cuh"
#include "cuda_emulation.h"

using namespace leaf_cuda;
using namespace leaf_cuda::cuda;
using cuda_emulation::Schedule;

namespace {

int passed = 0, failed = 0;
bool stop_at_first_failure = false;

void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (ok) return;
  std::printf("FAILED %s\n", what.c_str());
  if (stop_at_first_failure) std::exit(1);
}

// n elements that end where the allocation ends, `offset` elements behind a 16-byte boundary.
template <class S>
struct Buffer {
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};
  S* data;
  int64_t n;

  explicit Buffer(int64_t count, int64_t offset = 0) : n(count) {
    memory.reset(static_cast<char*>(std::malloc((count + offset) * sizeof(S) + 1)));
    data = reinterpret_cast<S*>(memory.get()) + offset;
    poison();
  }
  void poison() { std::memset(static_cast<void*>(data), 0xff, n * sizeof(S)); }
  template <class Random>
  void fill(Random& random) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < n; ++i) data[i] = static_cast<S>(static_cast<float>(2 * normal(random)));
  }
  bool same_bits(const Buffer& other) const { return std::memcmp(data, other.data, n * sizeof(S)) == 0; }
};

template <class S>
constexpr c10::ScalarType kType = c10::ScalarType::Half;
template <>
constexpr c10::ScalarType kType<double> = c10::ScalarType::Double;
template <>
constexpr c10::ScalarType kType<float> = c10::ScalarType::Float;
template <>
constexpr c10::ScalarType kType<c10::BFloat16> = c10::ScalarType::BFloat16;

struct Case {
  Plan plan;
  int64_t offset = 0;  // of u, in elements: 1 makes the kernels take single elements
  int grad_stride = 1;
  int64_t shared_parameter = -1;  // this one has one value for all
  bool p2_and_p4 = true;
  bool want_du = true;
  int64_t multiprocessors = 2;
};

std::string name(const Case& c, const char* type, const char* what) {
  char text[200];
  std::snprintf(text, sizeof(text), "%s %s (%ld, %ld, %ld) offset %ld grad stride %d shared %ld p2p4 %d du %d mp %ld",
                what, type, long(c.plan.outer), long(c.plan.count), long(c.plan.inner), long(c.offset), c.grad_stride,
                long(c.shared_parameter), c.p2_and_p4, c.want_du, long(c.multiprocessors));
  return text;
}

const Schedule kSchedules[] = {{Schedule::ascending, Schedule::ascending, 0},
                               {Schedule::descending, Schedule::descending, 0},
                               {Schedule::shuffled, Schedule::shuffled, 1},
                               {Schedule::shuffled, Schedule::shuffled, 2}};

auto launcher(const Schedule& schedule) {
  return [&schedule](auto kernel, dim3 grid, int threads, size_t shared, const auto&... args) {
    cuda_emulation::launch(schedule, kernel, grid, dim3(threads), shared, args...);
  };
}

// Whether |got − want| is within `ulps` units of S's relative precision, on the scale of the terms that made it, or
// within half's smallest number.
template <class S>
bool close(double got, double want, double scale, double ulps) {
  const double epsilon = sizeof(S) == 8                 ? 0x1p-52
                         : sizeof(S) == 4               ? 0x1p-23
                         : kType<S> == kType<c10::Half> ? 0x1p-10
                                                        : 0x1p-7;
  return std::abs(got - want) <= ulps * epsilon * scale + (kType<S> == kType<c10::Half> ? 0x1p-24 : 0);
}

// P is the parameters' type, as in PyTorch: float for the half types, else S.
template <class S, class P>
void run(const Case& c, const char* type) {
  std::mt19937_64 random(c.plan.numel() * 31 + c.offset);
  const int64_t n = c.plan.numel(), count = c.plan.count;
  Buffer<S> u(n, c.offset), grad(c.grad_stride ? n : 1), y(n), du(n);
  u.fill(random);
  grad.fill(random);
  std::vector<Buffer<P>> p, dp;
  FlatParameters parameters{kType<P>, {}, {}};
  for (int q = 0; q < 4; ++q) {
    p.emplace_back(q == c.shared_parameter ? 1 : count);
    p[q].fill(random);
    dp.emplace_back(count);
    if (q % 2 == 1 && !c.p2_and_p4) continue;
    parameters.p[q] = p[q].data;
    parameters.stride[q] = q == c.shared_parameter ? 0 : 1;
  }

  // The plain loop, in double.
  std::vector<double> want_y(n), want_du(n), scale_y(n), scale_du(n), want_dp(4 * count), scale_dp(4 * count);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t k = i / c.plan.inner % count;
    const auto value = [&](int q) {
      return parameters.p[q] ? static_cast<double>(static_cast<const P*>(parameters.p[q])[k * parameters.stride[q]])
                             : 0.0;
    };
    const double x = static_cast<double>(u.data[i]), g = static_cast<double>(grad.data[i * c.grad_stride]);
    const double z = value(2) * x, s = 1 / (1 + std::exp(-z)), t = 1 / (1 + std::exp(z)), l = value(0) * x + value(1);
    const double l_abs = std::abs(value(0) * x) + std::abs(value(1));
    want_y[i] = l * s + value(3);
    scale_y[i] = l_abs * s * (1 + std::abs(z)) + std::abs(value(3));
    want_du[i] = g * (value(0) * s + l * s * t * value(2));
    scale_du[i] = std::abs(g) * (std::abs(value(0) * s) + l_abs * s * t * std::abs(value(2))) * (1 + std::abs(z));
    const double terms[4] = {g * x * s, g * s, g * l * s * t * x, g};
    const double scales[4] = {std::abs(terms[0]), std::abs(terms[1]), std::abs(g * l_abs * s * t * x), std::abs(g)};
    for (int q = 0; q < 4; ++q) {
      want_dp[q * count + k] += terms[q];
      scale_dp[q * count + k] += scales[q] * (1 + std::abs(z));
    }
  }

  bool same = true;
  Buffer<S> first_y(n), first_du(n);
  std::vector<Buffer<P>> first_dp;
  for (const Schedule& schedule : kSchedules) {
    y.poison();
    du.poison();
    for (auto& d : dp) d.poison();
    try {
      launch_forward({c.plan, parameters, kType<S>, u.data, y.data}, c.multiprocessors, launcher(schedule));
      BackwardArgs args{c.plan, parameters, kType<S>, u.data, grad.data, c.grad_stride, c.want_du ? du.data : nullptr};
      for (int q = 0; q < 4; ++q) args.dp[q] = parameters.p[q] ? dp[q].data : nullptr;
      args.dp_dtype = kType<P>;
      const BackwardPlan plan = plan_backward(args, c.multiprocessors);
      check(plan.workspace_bytes <= std::max<int64_t>(n * sizeof(S) / 8, 1 << 20), name(c, type, "workspace"));
      Buffer<char> workspace(plan.workspace_bytes);
      launch_backward(args, plan, workspace.data, launcher(schedule));
    } catch (const std::exception& error) {
      check(false, name(c, type, error.what()));
      return;
    }
    if (first_dp.empty()) {
      std::memcpy(static_cast<void*>(first_y.data), y.data, n * sizeof(S));
      std::memcpy(static_cast<void*>(first_du.data), du.data, n * sizeof(S));
      for (int q = 0; q < 4; ++q) {
        first_dp.emplace_back(count);
        std::memcpy(static_cast<void*>(first_dp[q].data), dp[q].data, count * sizeof(P));
      }
    }
    same = same && y.same_bits(first_y) && du.same_bits(first_du);
    for (int q = 0; q < 4; ++q) same = same && dp[q].same_bits(first_dp[q]);
  }
  check(same, name(c, type, "same bits in every schedule"));

  bool ok = true;
  for (int64_t i = 0; i < n; ++i) ok = ok && close<S>(static_cast<double>(y.data[i]), want_y[i], scale_y[i], 4);
  check(ok, name(c, type, "y"));
  ok = true;
  if (c.want_du)
    for (int64_t i = 0; i < n; ++i) ok = ok && close<S>(static_cast<double>(du.data[i]), want_du[i], scale_du[i], 8);
  check(ok, name(c, type, "du"));
  ok = true;
  for (int q = 0; q < 4; ++q)
    for (int64_t k = 0; k < count; ++k)
      if (parameters.p[q])
        ok = ok && close<P>(static_cast<double>(dp[q].data[k]), want_dp[q * count + k], scale_dp[q * count + k], 16);
  check(ok, name(c, type, "dp"));
}

void run_types(const Case& c) {
  run<double, double>(c, "double");
  run<float, float>(c, "float");
  run<c10::BFloat16, float>(c, "bfloat16");
  run<c10::Half, c10::Half>(c, "half");
}

void small_plans() {
  // Tails: 0 ... 2·(widest vector) + 1 elements over a whole number of vectors, in rows and in columns.
  for (int64_t n = 1; n <= 17; ++n) {
    run_types({{1, 1, n}});
    run_types({{1, 1, 128 + n}});
    run_types({{3, 5, 64 + n}});
    run_types({{3, n, 1}});
    run_types({{40, 32 + n, 1}});
    run_types({{5, 3, n}});
  }
  for (int64_t offset : {1, 3})
    for (const Plan& plan : {Plan{1, 1, 1000}, Plan{3, 5, 67}, Plan{33, 40, 1}, Plan{9, 7, 4}})
      run_types({plan, offset});
  for (const Plan& plan : {Plan{1, 1, 5000}, Plan{7, 3, 196}, Plan{300, 33, 1}, Plan{64, 10, 9}, Plan{2, 700, 1},
                           Plan{1, 70, 40}, Plan{1000, 3, 1}, Plan{1, 600, 1}, Plan{5, 300, 70}, Plan{3, 5000, 1}})
    for (int64_t multiprocessors : {1, 5, 132}) {
      Case c{plan};
      c.multiprocessors = multiprocessors;
      run_types(c);
      c.grad_stride = 0;
      run_types(c);
      c.shared_parameter = 2;
      c.p2_and_p4 = false;
      run_types(c);
      c.want_du = false;
      run_types(c);
    }
}

// Index arithmetic beyond 2^31, by planning alone.
void large_plans() {
  const int64_t big = (int64_t{1} << 31) + 17;
  for (const Plan& plan : {Plan{1, 1, big}, Plan{big, 3, 64}, Plan{5, big, 100}, Plan{3, 7, big}}) {
    constexpr int N = 8;
    const RowsLaunch r = plan_rows(plan, N, 2, 132);
    const std::string what = "rows " + std::to_string(plan.outer) + " " + std::to_string(plan.count);
    check(r.grid >= 1 && r.grid <= max_grid(132) && r.threads % kWarp == 0, what + " grid");
    check(r.step_rows * r.vectors + r.step_vectors == r.splits * r.threads, what + " step");
    check(r.vectors * N >= plan.inner, what + " vectors");
    check(4 * 4 * r.splits * r.count <= workspace_limit(plan, 2), what + " workspace");
    // The last element is in the slots of the last row, and it is the last.
    bool found = false;
    for (int64_t v = std::max<int64_t>(0, r.vectors - 3); v < r.vectors; ++v) {
      const auto slot = RowCursor<N>(r, plan.count - 1, (plan.outer - 1) * r.vectors + v).slot();
      found = found || (slot.lo < slot.hi && slot.first + slot.hi == plan.numel());
      check(slot.lo >= slot.hi || (slot.first >= 0 && slot.first % N == 0 && slot.first + slot.hi <= plan.numel()),
            what + " slot");
    }
    check(found, what + " last element");
  }
  for (const Plan& plan : {Plan{big, 3, 1}, Plan{3, big, 1}, Plan{big, 1000, 7}}) {
    constexpr int N = 8;
    const ColumnsLaunch c = plan_columns(plan, N, 2, 132, 2, 4);
    const std::string what = "columns " + std::to_string(plan.outer) + " " + std::to_string(plan.count);
    check(c.tiles >= 1 && c.tiles <= kMaxGridX && c.splits >= 1 && c.splits <= kMaxGridY, what + " grid");
    check(c.threads <= kMaxThreads && c.tx * c.ty <= c.threads, what + " threads");
    check(c.columns.width * c.columns.rows + c.columns.tail == plan.numel(), what + " elements");
    check(c.tiles * c.tx * N >= c.columns.width && c.columns.width % N == 0, what + " tiles");
    check(c.tx * N % plan.inner == 0, what + " whole parameters in a tile");
  }
}

}  // namespace

int main(int argc, char** argv) {
  stop_at_first_failure = argc > 1 && std::strcmp(argv[1], "--stop-at-first-failure") == 0;
  small_plans();
  large_plans();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
