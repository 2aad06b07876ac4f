#include "leaf_pass.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace leaf_cuda {
namespace {

bool is_one_element(const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1 && t.stride(d) != 0) return false;
  return true;
}

Broadcast make_broadcast(const Tensor& u, at::ArrayRef<OptionalTensor> parameters, bool by_lines) {
  c10::SmallVector<Tensor, kMaxParameters> given;
  for (const OptionalTensor& p : parameters)
    if (p) given.push_back(*p);
  return Broadcast(u, given, by_lines);
}

}  // namespace

Tensor result_like(const Tensor& u, Tensor& source) {
  Tensor result = at::empty_like(u);
  source = u.is_non_overlapping_and_dense() ? u : result.copy_(u);
  return result;
}

std::optional<int64_t> line_pitch(const Tensor& t) {
  if (t.dim() == 0 || (t.size(-1) != 1 && t.stride(-1) != 1)) return std::nullopt;
  std::optional<int64_t> pitch;
  int64_t lines = 1;
  for (int64_t d = t.dim() - 2; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (!pitch) pitch = t.stride(d);
    if (t.stride(d) != lines * *pitch) return std::nullopt;
    lines *= t.size(d);
  }
  if (!pitch) return t.size(-1);
  return *pitch < t.size(-1) ? std::nullopt : pitch;
}

bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

std::array<Tensor, 4> no_sums(const ParameterList& parameters, std::array<bool, 4> wanted) {
  std::array<Tensor, 4> dp;
  for (int q = 0; q < 4; ++q)
    if (wanted[q] && parameters[q]) dp[q] = at::zeros(parameters[q]->sizes(), parameters[q]->options());
  return dp;
}

Pass::Pass(Operation operation, const Tensor& u, at::ArrayRef<OptionalTensor> parameters, bool by_lines)
    : u_(u), broadcast_(make_broadcast(u, parameters, by_lines)) {
  args_.operation = operation;
  args_.plan = broadcast_.plan();
  args_.dtype = u.scalar_type();
  args_.parameters.dtype = parameters[0]->scalar_type();
  args_.workspace = workspace_limit(u.numel(), u.element_size());
  for (const OptionalTensor& p : parameters) parameters_.push_back(p.value_or(Tensor()));
  args_.in[0] = u.const_data_ptr();
  args_.in_stride[0] = 1;
  if (!by_lines) return;
  args_.line = u.size(-1);
  args_.in_pitch[0] = *line_pitch(u);
}

void Pass::add_input(const Tensor& t) {
  const int k = next_input_++;
  const bool one = is_one_element(t);
  const bool fits = args_.line ? line_pitch(t).has_value() : same_layout(t, u_);
  const auto copy = [&] { return args_.line ? t.contiguous() : at::empty_like(u_).copy_(t); };
  inputs_[k] = one || fits ? t : copy();
  args_.in[k] = inputs_[k].const_data_ptr();
  args_.in_stride[k] = one ? 0 : 1;
  if (args_.line && !one) args_.in_pitch[k] = *line_pitch(inputs_[k]);
}

void Pass::add_output(const Tensor& t) {
  const int k = next_output_++;
  if (!t.defined()) return;
  args_.out[k] = t.mutable_data_ptr();
  if (args_.line) args_.out_pitch[k] = *line_pitch(t);
}

int64_t Pass::window_size(int64_t bytes) {
  for (const Tensor& p : parameters_)
    if (p.defined() && !broadcast_.lies_flat(p)) bytes += p.element_size();
  const int64_t count = args_.plan.count;
  const int64_t size = args_.line || bytes == 0 ? count : std::clamp<int64_t>(args_.workspace / 2 / bytes, 1, count);
  args_.workspace = std::max<int64_t>(args_.workspace - size * bytes, 0);
  return size;
}

bool Pass::run_in_place(Run by, const std::array<Tensor, 4>& dp) {
  c10::SmallVector<const Tensor*, 12> tensors;
  for (const Tensor& p : parameters_) tensors.push_back(&p);
  for (const Tensor& d : dp) tensors.push_back(&d);
  const auto matrix = broadcast_.matrix(tensors);
  if (!matrix) return false;
  Args args = args_;
  args.parameters.matrix = matrix->of_run;
  for (size_t q = 0; q < parameters_.size(); ++q) {
    if (!parameters_[q].defined()) continue;
    args.parameters.p[q] = parameters_[q].const_data_ptr();
    args.parameters.strides[q] = matrix->strides[q];
  }
  args.dp_dtype = args.parameters.dtype;
  for (size_t q = 0; q < dp.size(); ++q) {
    if (!dp[q].defined()) continue;
    args.dp[q] = dp[q].mutable_data_ptr();
    args.dp_strides[q] = matrix->strides[parameters_.size() + q];
  }
  by(args, u_);
  return true;
}

void Pass::run_window(Run by, const Broadcast::Window& window, Args args) const {
  c10::SmallVector<Tensor, 8> flat(parameters_.size());
  args.parameters.matrix = {1, window.count};
  for (size_t q = 0; q < parameters_.size(); ++q) {
    if (!parameters_[q].defined()) continue;
    flat[q] = broadcast_.flatten(parameters_[q], window);
    args.parameters.p[q] = flat[q].const_data_ptr();
    args.parameters.strides[q] = {0, flat[q].numel() == 1 ? 0 : 1};
  }
  for (ParameterStrides& s : args.dp_strides) s = {0, 1};
  args.plan.count = window.count;
  const int64_t offset = window.first * args.plan.inner * u_.element_size();
  for (int k = 0; k < kMaxInputs; ++k)
    if (args.in_stride[k]) args.in[k] = static_cast<const char*>(args.in[k]) + offset;
  for (void*& out : args.out)
    if (out) out = static_cast<char*>(out) + offset;
  by(args, u_);
}

void Pass::run(Run by) {
  if (run_in_place(by, {})) return;
  broadcast_.for_each_window(window_size(0), [&](const auto& window) { run_window(by, window, args_); });
}

std::array<Tensor, 4> Pass::run_with_sums(Run by, std::array<bool, 4> wanted) {
  int64_t sums = 0;
  bool all = true;
  for (int q = 0; q < 4; ++q) {
    wanted[q] = wanted[q] && parameters_[q].defined();
    sums += wanted[q];
    all = all && (!wanted[q] || broadcast_.has_all(parameters_[q]));
  }
  std::array<Tensor, 4> dp;
  if (all) {
    for (int q = 0; q < 4; ++q)
      if (wanted[q]) dp[q] = at::empty(parameters_[q].sizes(), parameters_[q].options());
    if (run_in_place(by, dp)) return dp;
    dp = {};
  }
  args_.dp_dtype = at::toOpMathType(args_.dtype);
  const int64_t limit = args_.workspace, size = window_size(sums * c10::elementSize(args_.dp_dtype));
  std::array<Tensor, 4> window_dp;
  for (int q = 0; q < 4; ++q) {
    if (!wanted[q]) continue;
    const Tensor& p = parameters_[q];
    // A value of a small parameter may have shares in many windows, which are therefore added in double: these sums
    // take at most a quarter of the limit.
    const int64_t bytes = sizeof(double) * p.numel();
    const bool fits = 16 * bytes <= limit;
    if (fits) args_.workspace -= bytes;
    dp[q] = at::zeros(p.sizes(), p.options().dtype(fits ? at::kDouble : args_.dp_dtype));
    window_dp[q] = at::empty({size}, p.options().dtype(args_.dp_dtype));
    args_.dp[q] = window_dp[q].mutable_data_ptr();
  }
  broadcast_.for_each_window(size, [&](const auto& window) {
    run_window(by, window, args_);
    for (int q = 0; q < 4; ++q)
      if (wanted[q]) broadcast_.add(window_dp[q].narrow(0, 0, window.count), window, dp[q]);
  });
  for (int q = 0; q < 4; ++q)
    if (wanted[q]) dp[q] = dp[q].to(args_.parameters.dtype);
  return dp;
}

}  // namespace leaf_cuda
