#include "broadcast.h"

#include <ATen/ops/sum.h>

#include <numeric>

namespace leaf_cuda {
namespace {

// The parameter's size along dimension d of a u of `dim` dimensions, by PyTorch's right-aligned rule.
int64_t size_along(const at::Tensor& parameter, int64_t d, int64_t dim) {
  const int64_t own = d - dim + parameter.dim();
  return own < 0 ? 1 : parameter.size(own);
}

int64_t stride_along(const at::Tensor& parameter, int64_t d, int64_t dim) {
  return size_along(parameter, d, dim) == 1 ? 0 : parameter.stride(d - dim + parameter.dim());
}

// A dimension of an array that is added to another, and both arrays' strides; the other's is 0 where it is summed over.
struct Dimension {
  int64_t size, from, to;
};
using Dimensions = c10::SmallVector<Dimension, 5>;

// The dimensions of two arrays of the same shape, merged into as few as possible.
Dimensions dimensions_of(const at::Tensor& from, const at::Tensor& to) {
  Dimensions result;
  for (int64_t d = 0; d < from.dim(); ++d) {
    const Dimension next{from.size(d), from.stride(d), to.stride(d)};
    if (next.size == 1) continue;
    Dimension* const last = result.empty() ? nullptr : &result.back();
    if (last && last->from == next.size * next.from && last->to == next.size * next.to)
      *last = {last->size * next.size, next.from, next.to};
    else
      result.push_back(next);
  }
  return result;
}

// Calls f(from, to) with the two offsets of each index of the dimensions, in order.
template <class F>
void walk(at::ArrayRef<Dimension> dimensions, int64_t from, int64_t to, const F& f) {
  if (dimensions.empty()) return f(from, to);
  const Dimension& d = dimensions[0];
  for (int64_t i = 0; i < d.size; ++i) walk(dimensions.slice(1), from + i * d.from, to + i * d.to, f);
}

// to += from, summed over where `to` has stride 0. Every sum is made in double, in an order fixed by the shape, and
// added once. (at::sum divides a tensor among the available threads, so that its result depends on their number.)
template <class T, class A>
void add_in_order(const T* from, const Dimensions& dimensions, A* to) {
  constexpr int64_t kLanes = 64;
  Dimensions kept, summed;
  for (const Dimension& d : dimensions) (d.to ? kept : summed).push_back(d);
  // Lines of the last dimension, which is contiguous: where it is kept, each lane is a sum of its own; where it is
  // summed over, all lanes belong to one sum.
  const Dimension line = dimensions.empty() ? Dimension{1, 1, 1} : dimensions.back();
  Dimensions& own = line.to ? kept : summed;
  if (!dimensions.empty()) own.pop_back();
  const auto add_lanes = [&](const T* values, int64_t n, double* lanes) {
    for (int64_t j = 0; j < n; ++j) lanes[j] += values[j];
  };
  walk(kept, 0, 0, [&](int64_t from_kept, int64_t to_kept) {
    double lanes[kLanes] = {};
    for (int64_t begin = 0; begin < line.size; begin += kLanes) {
      const int64_t n = std::min(kLanes, line.size - begin);
      walk(summed, from_kept + begin, 0, [&](int64_t i, int64_t) { add_lanes(from + i, n, lanes); });
      if (!line.to) continue;
      for (int64_t j = 0; j < n; ++j) to[to_kept + (begin + j) * line.to] += static_cast<A>(lanes[j]);
      std::fill_n(lanes, n, 0.0);
    }
    if (!line.to) to[to_kept] += static_cast<A>(std::accumulate(lanes, lanes + kLanes, 0.0));
  });
}

// Calls f with the tensor's data as double* or float*.
template <class F>
void dispatch_arithmetic(const at::Tensor& t, F f) {
  t.scalar_type() == at::kDouble ? f(t.mutable_data_ptr<double>()) : f(t.mutable_data_ptr<float>());
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
    plan_ = {1, 1, u.numel()};
    return;
  }
  run_.assign(first, last);
  const auto product = [&](auto begin, auto end) {
    return std::accumulate(begin, end, int64_t{1}, [&](int64_t n, int64_t d) { return n * sizes_[d]; });
  };
  plan_ = {product(order.begin(), first), product(first, last), product(last, order.end())};
}

std::optional<Broadcast::Matrix> Broadcast::matrix(at::ArrayRef<const at::Tensor*> tensors) const {
  Matrix result{{1, 1}, {}};
  result.strides.resize(tensors.size());
  ParameterMatrix& run = result.of_run;
  for (size_t k = run_.size(); k-- > 0;) {
    const int64_t size = run_size(k);
    if (size == 1) continue;
    // Calls f(a tensor's strides, its stride along this dimension) for each; false as soon as f returns false.
    const auto all = [&](auto f) {
      for (size_t t = 0; t < tensors.size(); ++t)
        if (tensors[t]->defined() && !f(result.strides[t], stride_along(*tensors[t], run_[k], sizes_.size())))
          return false;
      return true;
    };
    if (run.columns == 1) {
      all([](ParameterStrides& s, int64_t stride) { return s.column = stride, true; });
      run.columns = size;
    } else if (run.rows == 1 && all([&](const auto& s, int64_t stride) { return stride == run.columns * s.column; })) {
      run.columns *= size;
    } else if (run.rows == 1) {
      all([](ParameterStrides& s, int64_t stride) { return s.row = stride, true; });
      run.rows = size;
    } else if (all([&](const auto& s, int64_t stride) { return stride == run.rows * s.row; })) {
      run.rows *= size;
    } else {
      return std::nullopt;
    }
  }
  return result;
}

bool Broadcast::lies_flat(const at::Tensor& parameter) const {
  return parameter.numel() == 1 ||
         (has_all(parameter) && parameter.is_contiguous() && std::is_sorted(run_.begin(), run_.end()));
}

at::Tensor Broadcast::part(const at::Tensor& parameter, const Window& window) const {
  const int64_t dim = static_cast<int64_t>(sizes_.size());
  at::DimVector sizes, strides;
  int64_t offset = parameter.storage_offset();
  for (size_t k = 0; k < run_.size(); ++k) {
    sizes.push_back(size_along(parameter, run_[k], dim) == 1 ? 1 : window.size[k]);
    strides.push_back(stride_along(parameter, run_[k], dim));
    offset += window.begin[k] * strides.back();
  }
  return parameter.as_strided(sizes, strides, offset);
}

at::Tensor Broadcast::flatten(const at::Tensor& parameter, const Window& window) const {
  if (parameter.numel() == 1 || (lies_flat(parameter) && window.count == plan_.count)) return parameter;
  const at::Tensor values = part(parameter, window);
  return values.numel() == 1 ? values : values.expand(window.size).contiguous();
}

void Broadcast::add(const at::Tensor& flat, const Window& window, const at::Tensor& gradient) const {
  const at::Tensor to = part(gradient, window), from = flat.view(window.size);
  if (flat.is_cpu()) {
    const Dimensions dimensions = dimensions_of(from, to.expand(window.size));
    dispatch_arithmetic(from, [&](const auto* values) {
      dispatch_arithmetic(to, [&](auto* sums) { add_in_order(values, dimensions, sums); });
    });
    return;
  }
  at::DimVector summed;
  for (int64_t d = 0; d < to.dim(); ++d)
    if (to.size(d) != from.size(d)) summed.push_back(d);
  // Summed in its own dtype: with another one for the sum, CUDA would first copy the whole tensor to that.
  to.add_(summed.empty() ? from : from.sum(summed, /*keepdim=*/true));
}

}  // namespace leaf_cuda
