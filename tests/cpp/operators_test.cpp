// The operators from C++, without Python: forward and backward through autograd equal PyTorch's own formula.
#include <torch/torch.h>

#include <cstdio>

namespace {

torch::Tensor fused(const torch::Tensor& u, const std::vector<torch::Tensor>& p) {
  using Forward = torch::Tensor(const torch::Tensor&, const torch::Tensor&, const std::optional<torch::Tensor>&,
                                const torch::Tensor&, const std::optional<torch::Tensor>&);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("leaf_cuda::leaf_forward", "").typed<Forward>();
  return op.call(u, p[0], p[1], p[2], p[3]);
}

torch::Tensor formula(const torch::Tensor& u, const std::vector<torch::Tensor>& p) {
  return (p[0] * u + p[1]) * torch::sigmoid(p[2] * u) + p[3];
}

}  // namespace

int main() {
  torch::manual_seed(0);
  int passed = 0, failed = 0;
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{1}, {8, 1, 1}, {8, 5, 7}, {8, 1, 7}}) {
    auto u = torch::randn({4, 8, 5, 7}, torch::kDouble).requires_grad_();
    std::vector<torch::Tensor> inputs = {u}, p;
    for (int q = 0; q < 4; ++q) p.push_back(torch::randn(shape, torch::kDouble).requires_grad_());
    inputs.insert(inputs.end(), p.begin(), p.end());
    const auto g = torch::randn_like(u);
    const auto y = fused(u, p), y_want = formula(u, p);
    auto got = torch::autograd::grad({y}, inputs, {g}), want = torch::autograd::grad({y_want}, inputs, {g});
    got.push_back(y);
    want.push_back(y_want);
    for (size_t k = 0; k < got.size(); ++k) torch::allclose(got[k], want[k], 1e-12, 1e-13) ? ++passed : ++failed;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
