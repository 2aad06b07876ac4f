#include "leaf_pass.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

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
  for (size_t q = 0; q < parameters.size(); ++q) {
    if (q < 4) own_[q] = parameters[q];
    if (!parameters[q]) continue;
    flat_[q] = broadcast_.flatten(*parameters[q]);
    args_.parameters.p[q] = flat_[q].const_data_ptr();
    args_.parameters.stride[q] = flat_[q].numel() == 1 ? 0 : 1;
  }
  args_.in[0] = u.const_data_ptr();
  args_.in_stride[0] = 1;
  if (!by_lines) return;
  args_.run = u.size(-1);
  args_.in_pitch[0] = *line_pitch(u);
}

void Pass::add_input(const Tensor& t) {
  const int k = next_input_++;
  const bool one = is_one_element(t);
  const bool fits = args_.run ? line_pitch(t).has_value() : same_layout(t, u_);
  const auto copy = [&] { return args_.run ? t.contiguous() : at::empty_like(u_).copy_(t); };
  inputs_[k] = one || fits ? t : copy();
  args_.in[k] = inputs_[k].const_data_ptr();
  args_.in_stride[k] = one ? 0 : 1;
  if (args_.run && !one) args_.in_pitch[k] = *line_pitch(inputs_[k]);
}

void Pass::add_output(const Tensor& t) {
  const int k = next_output_++;
  if (!t.defined()) return;
  args_.out[k] = t.mutable_data_ptr();
  if (args_.run) args_.out_pitch[k] = *line_pitch(t);
}

std::array<Tensor, 4> Pass::run_with_sums(Run by, std::array<bool, 4> wanted) {
  // Where every gradient has its parameter's own shape, the loops write it; else it is summed to that shape from
  // `count` values in the arithmetic dtype.
  bool flat = true;
  for (int q = 0; q < 4; ++q) {
    wanted[q] = wanted[q] && own_[q];
    flat = flat && (!wanted[q] || broadcast_.is_flat(*own_[q]));
  }
  args_.dp_dtype = flat ? args_.parameters.dtype : at::toOpMathType(args_.dtype);
  std::array<Tensor, 4> dp;
  for (int q = 0; q < 4; ++q) {
    if (!wanted[q]) continue;
    dp[q] = flat ? at::empty(own_[q]->sizes(), own_[q]->options())
                 : at::empty({args_.plan.count}, u_.options().dtype(args_.dp_dtype));
    args_.dp[q] = dp[q].mutable_data_ptr();
  }
  run(by);
  if (flat) return dp;
  flat_ = {};
  for (int q = 0; q < 4; ++q)
    if (wanted[q]) dp[q] = broadcast_.unflatten(dp[q], *own_[q]);
  return dp;
}

}  // namespace leaf_cuda
