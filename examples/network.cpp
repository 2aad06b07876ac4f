// A network with LEAF in C++, without Python: learns XOR. Exits with 0 if it has.
//
//   cmake -S . -B build -DCMAKE_PREFIX_PATH=<LibTorch> && cmake --build build && build/network
#include <torch/torch.h>

#include <cstdio>

// y = (p1·u + p2)·σ(p3·u) + p4 by the fused operator of libleaf_cuda, which registers itself when it is loaded.
torch::Tensor leaf(const torch::Tensor& u, const torch::Tensor& p1, const std::optional<torch::Tensor>& p2,
                   const torch::Tensor& p3, const std::optional<torch::Tensor>& p4) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("leaf_cuda::leaf_forward", "").typed<decltype(leaf)>();
  return op.call(u, p1, p2, p3, p4);
}

// One set of parameters per feature, from the form of Tanh.
struct LeafImpl : torch::nn::Module {
  explicit LeafImpl(int64_t features)
      : p1(register_parameter("p1", torch::full({features}, 0.0))),
        p2(register_parameter("p2", torch::full({features}, 2.0))),
        p3(register_parameter("p3", torch::full({features}, 2.0))),
        p4(register_parameter("p4", torch::full({features}, -1.0))) {}
  torch::Tensor forward(const torch::Tensor& u) { return leaf(u, p1, p2, p3, p4); }

  torch::Tensor p1, p2, p3, p4;
};
TORCH_MODULE(Leaf);

int main() {
  torch::manual_seed(0);
  torch::nn::Sequential network(torch::nn::Linear(2, 8), Leaf(8), torch::nn::Linear(8, 1));
  const auto x = torch::tensor({{0.0f, 0.0f}, {0.0f, 1.0f}, {1.0f, 0.0f}, {1.0f, 1.0f}});
  const auto target = torch::tensor({{0.0f}, {1.0f}, {1.0f}, {0.0f}});
  torch::optim::Adam optimizer(network->parameters(), torch::optim::AdamOptions(0.03));
  for (int step = 0; step <= 300; ++step) {
    optimizer.zero_grad();
    const auto loss = torch::binary_cross_entropy_with_logits(network->forward(x), target);
    loss.backward();
    optimizer.step();
    if (step % 100 == 0) std::printf("step %d, loss %.4f\n", step, loss.item<float>());
  }
  const bool learnt = ((network->forward(x) > 0) == (target > 0.5)).all().item<bool>();
  const bool moved = (network->named_parameters()["1.p1"] != 0).all().item<bool>();
  std::printf("XOR %s, LEAF's parameters %s\n", learnt ? "learnt" : "not learnt", moved ? "trained" : "not trained");
  return learnt && moved ? 0 : 1;
}
