"""The CUDA backend on another device than the current one, and on another stream than the default one."""

import functools

import pytest
import torch
from cases import GRANULARITIES, draw, evaluate, gpu_is_emulated

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


@functools.cache  # made once for a device, since a copy from the host waits for the stream
def layer_on(device):
    torch.manual_seed(0)
    return leaf_nn.LeafLSTM(8, 3).to(device)


def recurrent(u, parameters, g):
    layer = layer_on(u.device)
    y = layer(u.flatten(0, -3))[0]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]


PASSES = [leaf, second_derivatives, gated, recurrent]


def case():
    """u, parameters, g on the CPU. Backward has partial sums, so a workspace and a second kernel."""
    return draw(*GRANULARITIES["layer"](96, 5, 8, 8), dtype=torch.float32)


def to(device, u, parameters, g):
    return u.to(device), [p.to(device) for p in parameters], g.to(device)


def assert_same(results, expected):
    for r, e in zip(results, expected, strict=True):
        assert torch.equal(r.cpu(), e.cpu())


@pytest.mark.parametrize("run", [leaf, second_derivatives, gated])
def test_the_case(run):
    if not gpu_is_emulated():
        pytest.skip("launches are counted on an emulated GPU only")
    drawn = to("cuda", *case())
    before = torch.ops.emulated_gpu.launches()
    run(*drawn)
    # Of second derivatives, backward's du alone is one kernel.
    assert torch.ops.emulated_gpu.launches() - before == {leaf: 3, second_derivatives: 4, gated: 3}[run]


@pytest.mark.parametrize("run", PASSES)
def test_another_device(run):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("the first two GPUs differ, and may add in another order")
    drawn = case()
    expected = run(*to("cuda:0", *drawn))
    results = run(*to("cuda:1", *drawn))
    assert torch.cuda.current_device() == 0
    assert all(r.device == torch.device("cuda:1") for r in results)
    assert_same(results, expected)


@pytest.mark.parametrize("run", PASSES)
def test_another_stream(run):
    """A stream's kernels run on it: before what it is given next and, as a GPU shows, after what it was given before."""
    u, parameters, g = to("cuda", *case())
    expected = run(2 * u, parameters, g)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
        results = [r.clone() for r in run(2 * u, parameters, g)]
    torch.cuda.synchronize()
    assert_same(results, expected)
