// Matrix products of a recurrent layer's steps.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <optional>

#include "cpu/cpu_capability.h"

namespace leaf_cuda {

// x·wᵀ for one w, (columns, inner), and many x, (rows, inner). On the CPU in float32, at::mm or oneDNN computes it,
// where torch has the latter, as in torch's own LSTM. docs/performance.md has the figures, of Zen 5 and Zen 3:
// - With AVX-512, at::mm takes twice the time for a step's few rows, but a call of oneDNN has some 10 µs of its own:
//   small products are left to at::mm.
// - Without it, at::mm is as fast or faster, but lays w out anew in each product: too slow if w is large.
// If enough products are to come, w is first brought into oneDNN's own layout, which takes 80 µs and 0.27 ns per
// element and saves 0.07 ns per element in every product.
class Product {
 public:
  // uses: number of products to come, with x of at most `rows` rows.
  Product(const at::Tensor& w, int64_t rows, int64_t uses) : w_(w), by_onednn_(is_by_onednn(w, rows, uses)) {
    if (!by_onednn_) return;
    w_ = dense(w);
    if (!is_worth_layout(w, uses)) return;
    static const auto reorder = find("mkldnn::_reorder_linear_weight",
                                     "mkldnn::_reorder_linear_weight(Tensor self, int? batch_size=None) -> Tensor Y");
    if (reorder) w_ = call(*reorder, {w_.contiguous(), rows});  // a transposed one takes five times as long
  }

  static bool is_by_onednn(const at::Tensor& w, int64_t rows, int64_t uses) {
    if (!onednn_takes(w) || rows == 0) return false;
    if (cpu::cpu_capability() == cpu::CpuCapability::avx512) return rows * w.numel() >= kLeastProduct;
    return w.numel() >= kLeastWeights && is_worth_layout(w, uses);
  }

  // out = x·wᵀ, plus `self` if it is defined. out may be self.
  void operator()(at::Tensor out, const at::Tensor& self, const at::Tensor& x) const {
    if (by_onednn_)
      self.defined() ? at::add_out(out, self, times(x)) : out.copy_(times(x));
    else
      self.defined() ? at::addmm_out(out, self, x, w_.t()) : at::mm_out(out, x, w_.t());
  }

  // x·wᵀ, plus a bias for each column if it is defined.
  at::Tensor times(const at::Tensor& x, const at::Tensor& bias = {}) const {
    if (!by_onednn_ || x.numel() == 0) return bias.defined() ? at::addmm(bias, x, w_.t()) : at::mm(x, w_.t());
    c10::IValue b;
    if (bias.defined()) b = bias.contiguous();  // oneDNN ignores its stride
    return call(*linear(), {x.contiguous(), w_, b, "none", c10::List<std::optional<at::Scalar>>(), ""});
  }

 private:
  static constexpr int64_t kLeastProduct = 3 << 18, kLeastWeights = 1 << 19;
  static constexpr int64_t kUsesWorthLayout = 4, kElementsWorthLayout = 1'100'000;

  at::Tensor w_;
  bool by_onednn_;

  // torch's operator, if it has the schema that is called here: these operators are not public.
  static std::optional<c10::OperatorHandle> find(const char* name, const char* schema) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    return op && c10::toString(op->schema()) == schema ? op : std::nullopt;
  }
  static const std::optional<c10::OperatorHandle>& linear() {
    static const auto op = find("mkldnn::_linear_pointwise",
                                "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, "
                                "str? algorithm) -> Tensor Y");
    return op;
  }
  static bool is_worth_layout(const at::Tensor& w, int64_t uses) {
    return uses >= kUsesWorthLayout + kElementsWorthLayout / w.numel();
  }
  static bool onednn_takes(const at::Tensor& w) {
    return w.is_cpu() && w.scalar_type() == at::kFloat && w.numel() > 0 && linear() &&
           at::globalContext().userEnabledMkldnn();
  }
  // m, or a copy if it has gaps: with these, oneDNN is very slow.
  static at::Tensor dense(const at::Tensor& m) {
    if (m.is_non_overlapping_and_dense()) return m;
    return m.stride(0) == 1 ? m.t().contiguous().t() : m.contiguous();
  }
  static at::Tensor call(const c10::OperatorHandle& op, torch::jit::Stack stack) {
    op.callBoxed(stack);
    return stack[0].toTensor();
  }
};

// aᵀ·b, contiguous, for an a of many columns. Instead of (bᵀ·a)ᵀ, whose result is copied, unless that is faster: for a
// b of few columns by MKL; for many rows by oneDNN, which copies aᵀ.
inline at::Tensor product_over_rows(const at::Tensor& a, const at::Tensor& b) {
  const bool by_onednn = Product::is_by_onednn(a.t(), b.size(1), 1);
  if (by_onednn ? a.size(0) < b.size(1) : b.size(1) >= 16) return Product(b.t(), a.size(1), 1).times(a.t());
  return Product(a.t(), b.size(1), 1).times(b.t()).t().contiguous();
}

}  // namespace leaf_cuda
