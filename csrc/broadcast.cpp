#include "broadcast.h"

#include <ATen/ops/zeros.h>

#include <algorithm>

namespace leaf_cuda {
namespace {

// The parameter's size along dimension d of a u of `dim` dimensions, by PyTorch's right-aligned rule.
int64_t size_along(const at::Tensor& parameter, int64_t d, int64_t dim) {
  const int64_t own = d - dim + parameter.dim();
  return own < 0 ? 1 : parameter.size(own);
}

// x.sum(dims, keepdim=true) for a contiguous x on the CPU, in memory order and in double. at::sum divides a whole
// tensor among the threads there are, so that its result depends on their number.
at::Tensor sum_in_order(const at::Tensor& x, at::IntArrayRef dims) {
  at::DimVector sizes(x.sizes().begin(), x.sizes().end());
  for (int64_t d : dims) sizes[d] = 1;
  const at::Tensor from = x.to(at::kDouble), result = at::zeros(sizes, from.options());
  const at::Tensor target = result.expand(x.sizes());  // stride 0 along the summed dimensions
  const double* value = from.const_data_ptr<double>();
  double* const sum = result.mutable_data_ptr<double>();
  at::DimVector index(x.dim(), 0);
  int64_t offset = 0;
  for (int64_t i = 0; i < x.numel(); ++i) {
    sum[offset] += value[i];
    for (int64_t d = x.dim() - 1; d >= 0; --d) {
      offset += target.stride(d);
      if (++index[d] < x.size(d)) break;
      offset -= x.size(d) * target.stride(d);
      index[d] = 0;
    }
  }
  return result;
}

}  // namespace

Broadcast::Broadcast(const at::Tensor& u, at::ArrayRef<at::Tensor> parameters, bool by_lines) : sizes_(u.sizes()) {
  at::DimVector order;
  for (int64_t d = 0; d < u.dim(); ++d)
    if (sizes_[d] != 1 || (by_lines && d == u.dim() - 1)) order.push_back(d);
  if (!by_lines && !u.is_contiguous())
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return u.stride(a) > u.stride(b); });

  const auto varies = [&](int64_t d) {
    return (by_lines && d == u.dim() - 1) ||
           std::any_of(parameters.begin(), parameters.end(),
                       [&](const at::Tensor& p) { return size_along(p, d, u.dim()) != 1; });
  };
  const auto first = std::find_if(order.begin(), order.end(), varies);
  const auto last = std::find_if(order.rbegin(), order.rend(), varies).base();
  if (first == order.end()) {
    plan_.inner = u.numel();
    return;
  }
  run_.assign(first, last);
  const auto product = [&](auto begin, auto end) {
    return std::accumulate(begin, end, int64_t{1}, [&](int64_t n, int64_t d) { return n * sizes_[d]; });
  };
  plan_ = {product(order.begin(), first), product(first, last), product(last, order.end())};
}

bool Broadcast::is_flat(const at::Tensor& parameter) const {
  return parameter.numel() == plan_.count && std::is_sorted(run_.begin(), run_.end());
}

at::Tensor Broadcast::flatten(const at::Tensor& parameter) const {
  if (parameter.numel() == 1 || (is_flat(parameter) && parameter.is_contiguous())) return parameter;
  const int64_t dim = static_cast<int64_t>(sizes_.size());
  at::DimVector run_sizes;
  for (int64_t d : run_) run_sizes.push_back(sizes_[d]);
  // The parameter with just the run's dimensions: first in u's order, then in the plan's.
  at::DimVector ascending(run_.begin(), run_.end());
  std::sort(ascending.begin(), ascending.end());
  at::DimVector ascending_sizes, to_run;
  for (int64_t d : ascending) ascending_sizes.push_back(size_along(parameter, d, dim));
  for (int64_t d : run_) to_run.push_back(std::find(ascending.begin(), ascending.end(), d) - ascending.begin());
  return parameter.reshape(ascending_sizes).permute(to_run).expand(run_sizes).contiguous();
}

at::Tensor Broadcast::unflatten(const at::Tensor& flat, const at::Tensor& parameter) const {
  const int64_t dim = static_cast<int64_t>(sizes_.size());
  at::DimVector run_sizes, summed, to_ascending;
  for (int64_t d : run_) run_sizes.push_back(sizes_[d]);
  for (size_t k = 0; k < run_.size(); ++k)
    if (size_along(parameter, run_[k], dim) == 1) summed.push_back(static_cast<int64_t>(k));
  for (size_t k = 0; k < run_.size(); ++k) to_ascending.push_back(static_cast<int64_t>(k));
  std::sort(to_ascending.begin(), to_ascending.end(), [&](int64_t a, int64_t b) { return run_[a] < run_[b]; });
  at::Tensor result = flat.view(run_sizes);
  if (!summed.empty()) result = flat.is_cpu() ? sum_in_order(result, summed) : result.sum(summed, /*keepdim=*/true);
  return result.permute(to_ascending).reshape(parameter.sizes()).to(parameter.scalar_type()).contiguous();
}

}  // namespace leaf_cuda
