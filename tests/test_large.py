"""An actual run with more than 2^31 elements: takes 9 GiB of memory on the CPU, 13 on a GPU. (The CUDA planner's
arithmetic is tested in tests/cpp/kernels_test.cpp.)"""

import pytest
import torch

import leaf_cuda

N = 2**31 + 17  # = 5 · 429496733
PATTERN = 5 * 2**16


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.cuda)],
    indirect=True,
)
@pytest.mark.parametrize("features", [1, 5])
def test_more_than_2_31_elements(device, features):
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("less than 16 GiB of the GPU's memory are free")
    pattern = torch.randn(PATTERN, dtype=torch.float16, device=device)
    whole = N // PATTERN * PATTERN
    u = torch.empty(N, dtype=torch.float16, device=device)
    u[:whole].view(-1, PATTERN).copy_(pattern)
    u[whole:] = pattern[: N - whole]
    p = [torch.randn(features, device=device) for _ in range(4)]

    def run(u, grad):
        u = u.view(-1, features).requires_grad_()
        y = leaf_cuda.leaf(u, *[x.requires_grad_() for x in p])
        return y.detach().flatten(), torch.autograd.grad(y, [u, *p], grad.expand_as(y))

    def check(long, short):
        assert torch.equal(long[:whole].view(-1, PATTERN), short.expand(whole // PATTERN, PATTERN))
        assert torch.equal(long[whole:], short[: N - whole])

    one = torch.ones((), dtype=torch.float16, device=device)
    y_pattern, (du_pattern, *dp_pattern) = run(pattern, one)
    _, (_, *dp_rest) = run(pattern[: N - whole], one)

    u.requires_grad_(False)
    y = leaf_cuda.leaf(u.view(-1, features), *[x.detach() for x in p]).flatten()
    check(y, y_pattern)
    del y
    du, *dp = torch.ops.leaf_cuda.leaf_backward(
        one.expand(N // features, features), u.view(-1, features), *[x.detach() for x in p], [True] * 5
    )
    check(du.flatten(), du_pattern.flatten())
    for got, repeated, rest in zip(dp, dp_pattern, dp_rest):
        torch.testing.assert_close(got, repeated * (whole // PATTERN) + rest, rtol=1e-5, atol=0)
