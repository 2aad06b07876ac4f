#include "leaf_checks.h"

namespace leaf_cuda {
namespace {

bool is_half(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

void check_parameter(const Names& names, const char* name, const Tensor& p, const Tensor& p1, const Tensor& u) {
  check_parameter_type(names, name, p, p1, u);
  const auto u_sizes = u.sym_sizes(), sizes = p.sym_sizes();
  const int64_t offset = u.dim() - p.dim();
  for (int64_t d = 0; d < p.dim(); ++d) {
    // Sizes that an export does not know yet pass; the kernel's own check will see them.
    const bool fits = TORCH_GUARD_OR_FALSE(sizes[d].sym_eq(1)) ||
                      (offset + d >= 0 && TORCH_GUARD_OR_TRUE(sizes[d].sym_eq(u_sizes[offset + d])));
    TORCH_CHECK_VALUE(fits, names.function, ": ", name, " of shape ", sizes, " does not broadcast to ", names.u,
                      " of shape ", u_sizes, "; its dimensions, aligned to the right, take 1 or ", names.u, "'s size");
  }
}

}  // namespace

std::string dtype_name(at::ScalarType type) { return "torch." + std::string(c10::getDtypeNames(type).first); }

void check_dtype(const Tensor& u, const Names& names) {
  TORCH_CHECK_TYPE(u.scalar_type() == at::kDouble || u.scalar_type() == at::kFloat || is_half(u.scalar_type()),
                   names.function, ": ", names.u, " has dtype ", dtype_name(u.scalar_type()),
                   "; it takes torch.float64, torch.float32, torch.bfloat16 or torch.float16");
}

void check_parameter_type(const Names& names, const char* name, const Tensor& p, const Tensor& p1, const Tensor& u) {
  const auto u_type = u.scalar_type(), type = p.scalar_type();
  TORCH_CHECK_TYPE(type == u_type || (is_half(u_type) && type == at::kFloat), names.function, ": ", name, " has dtype ",
                   dtype_name(type), ", but ", names.u, " of dtype ", dtype_name(u_type), " takes parameters of dtype ",
                   dtype_name(u_type), is_half(u_type) ? " or torch.float32" : "");
  TORCH_CHECK_TYPE(type == p1.scalar_type(), names.function, ": ", name, " has dtype ", dtype_name(type), " and p1 ",
                   dtype_name(p1.scalar_type()), "; all parameters take one dtype");
  TORCH_CHECK_VALUE(p.device() == u.device(), names.function, ": ", name, " is on ", p.device(), ", but ", names.u,
                    " is on ", u.device(), "; all tensors take one device");
}

void check(const Tensor& u, const ParameterList& parameters, const Names& names) {
  check_dtype(u, names);
  for (int q = 0; q < 4; ++q)
    if (parameters[q]) check_parameter(names, kNames[q], *parameters[q], *parameters[0], u);
}

void check_layout(const char* function, const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(t.defined(), function, ": ", name, " is None; it takes a tensor");
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, function, ": ", name, " has layout ", t.layout(), "; it takes Strided");
  TORCH_CHECK_TYPE(!t.is_nested() && !t.is_quantized(), function, ": ", name, " is a ",
                   t.is_nested() ? "nested" : "quantized", " tensor; it takes a plain one");
}

void check_layout(const char* function, const char* name, const OptionalTensor& t) {
  if (t) check_layout(function, name, *t);
}

void check_layout(const Tensor& u, const ParameterList& parameters, const Names& names) {
  check_layout(names.function, names.u, u);
  for (int q = 0; q < 4; ++q) check_layout(names.function, kNames[q], parameters[q]);
}

void check_like(const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " has dtype ", dtype_name(t.scalar_type()),
                   "; it takes that of ", like_name, ", ", dtype_name(like.scalar_type()));
  TORCH_CHECK_VALUE(t.device() == like.device(), name, " is on ", t.device(), ", but ", like_name, " is on ",
                    like.device());
  TORCH_CHECK_VALUE(t.sym_sizes() == like.sym_sizes(), name, " has shape ", t.sym_sizes(), "; it takes that of ",
                    like_name, ", ", like.sym_sizes());
}

void check_double_backward(const OptionalTensor& v, const ParameterList& vp, const Tensor& grad, const Tensor& u,
                           const ParameterList& parameters) {
  constexpr const char* names[] = {"leaf_double_backward: v1", "leaf_double_backward: v2", "leaf_double_backward: v3",
                                   "leaf_double_backward: v4"};
  check(u, parameters);
  check_like("leaf_double_backward: grad", grad, "u", u);
  if (v) check_like("leaf_double_backward: v", *v, "u", u);
  for (int q = 0; q < 4; ++q) {
    if (!vp[q]) continue;
    TORCH_CHECK_VALUE(parameters[q], names[q], " is a tensor, but ", kNames[q], " is None");
    check_like(names[q], *vp[q], kNames[q], *parameters[q]);
  }
}

}  // namespace leaf_cuda
