"""The CUDA backend on another device than the current one, and on another stream than the default one."""

import pytest
import torch
from cases import GRANULARITIES, draw, evaluate

import leaf_cuda
from leaf_cuda import nn as leaf_nn

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("needs_cuda")]


def leaf(u, parameters, g):
    return evaluate(leaf_cuda.leaf, u, parameters, g)


def second_derivatives(u, parameters, g):
    u, *parameters = (t.detach().requires_grad_() for t in (u, *parameters))
    du = torch.autograd.grad(leaf_cuda.leaf(u, *parameters), u, g, create_graph=True)
    return torch.autograd.grad(du, [u, *parameters[:3]], g)  # du does not depend on p4


def gated(u, parameters, g):
    return evaluate(lambda a, *p: leaf_cuda.leaf_glu(a, g, *p), u, parameters, g)


def recurrent(u, parameters, g):
    torch.manual_seed(0)
    layer = leaf_nn.LeafLSTM(u.shape[-1], 3).to(u.device)
    y = layer(u.flatten(0, -3))[0]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]


PASSES = [leaf, second_derivatives, gated, recurrent]


def case():
    """u, parameters, g on the CPU. So many rows that backward has a second kernel."""
    return draw(*GRANULARITIES["channel"](96, 5, 8, 8), dtype=torch.float32)


def to(device, u, parameters, g):
    return u.to(device), [p.to(device) for p in parameters], g.to(device)


def assert_same(results, expected):
    for r, e in zip(results, expected, strict=True):
        assert torch.equal(r.cpu(), e.cpu())


@pytest.mark.parametrize("run", PASSES)
def test_another_device(run):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    drawn = case()
    expected = run(*to("cuda:0", *drawn))
    results = run(*to("cuda:1", *drawn))
    assert torch.cuda.current_device() == 0
    assert all(r.device == torch.device("cuda:1") for r in results)
    assert_same(results, expected)


@pytest.mark.parametrize("run", PASSES)
def test_another_stream(run):
    """A stream's kernels run on it: after what it has been given before, and before what it is given next."""
    u, parameters, g = to("cuda", *case())
    expected = run(2 * u, parameters, g)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
        results = [r.clone() for r in run(2 * u, parameters, g)]
    torch.cuda.synchronize()
    assert_same(results, expected)
