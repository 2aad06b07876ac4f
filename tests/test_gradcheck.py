"""Gradients against finite differences, in float64."""

import pytest
import torch
from cases import FORMS, GRANULARITIES, LAYOUTS
from torch.autograd import gradcheck, gradgradcheck

import leaf_cuda


def inputs(shape, shapes, device, form=None):
    """u, and the parameters that are not None, requiring gradients. |u| ≥ 0.2: the step of the ReLU form, 2^-16 wide
    around 0, is narrower than a finite difference."""
    u = torch.rand(shape, dtype=torch.float64, device=device) + 0.2
    u = u * torch.where(torch.rand_like(u) < 0.5, -1.0, 1.0)
    values = torch.randn(4).tolist() if form is None else form
    parameters = [
        None
        if s is None
        else torch.full(s, v, dtype=torch.float64, device=device)
        + (form is None) * torch.rand(s, dtype=torch.float64, device=device)
        for s, v in zip(shapes, values)
    ]
    return [t if t is None else t.requires_grad_() for t in (u, *parameters)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_granularities(device, route, granularity):
    assert gradcheck(route, inputs(*GRANULARITIES[granularity](2, 3, 2, 2), device), check_batched_grad=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # PyTorch's own
@pytest.mark.parametrize("function", [leaf_cuda.leaf, torch.ops.leaf_cuda.leaf_forward], ids=["leaf", "operator"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_forward_mode(device, function, granularity):
    arguments = inputs(*GRANULARITIES[granularity](2, 3, 2, 1), device)
    assert gradcheck(
        function, arguments, check_forward_ad=True, check_backward_ad=False, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("form", FORMS)
def test_forms(device, route, form):
    assert gradcheck(route, inputs((3, 4), [(4,)] * 4, device, FORMS[form]))


@pytest.mark.parametrize("granularity", ["layer", "channel", "element", "no_run", "mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_u(device, route, granularity, layout):
    def laid_out(u, *parameters):
        return route(LAYOUTS[layout](u), *parameters)

    assert gradcheck(laid_out, inputs(*GRANULARITIES[granularity](2, 3, 2, 2), device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_gradient(device, route, layout):
    def laid_out(*arguments):
        return LAYOUTS[layout](route(*arguments))

    assert gradcheck(laid_out, inputs(*GRANULARITIES["mixed"](2, 3, 2, 2), device))


def test_numbers(device):
    u, p1, *_ = inputs((3, 4), [(4,)] * 4, device)
    assert gradcheck(lambda u, p1: leaf_cuda.leaf(u, p1, 0.5, 2, -1.25), (u, p1))
    assert gradcheck(lambda u: leaf_cuda.leaf(u, 1, None, 2.5, None), (u,))
    assert gradcheck(lambda u, p1: leaf_cuda.ahaf(u, p1, 1.5), (u, p1))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_second_order(device, route, granularity):
    assert gradgradcheck(route, inputs(*GRANULARITIES[granularity](2, 2, 2, 1), device), check_batched_grad=True)


@pytest.mark.parametrize("granularity", ["layer", "no_p2", "no_p4"])
def test_third_order(device, granularity):
    shape, shapes = GRANULARITIES[granularity](2, 2, 1, 1)
    u, *parameters = inputs(shape, shapes, device)

    def first(*arguments):
        wanted = [t for t in arguments if t is not None]
        return torch.autograd.grad(leaf_cuda.leaf(*arguments).sin().sum(), wanted, create_graph=True)

    assert gradgradcheck(first, (u, *parameters))


def test_parameters_of_more_dimensions_than_u(device, route):
    arguments = inputs((4,), [(1, 4), (1, 1, 1), (4,), (1, 4)], device)
    assert gradcheck(route, arguments)
    assert gradgradcheck(route, arguments)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_second_order_of_layouts(device, layout):
    def laid_out(u, *parameters):
        return leaf_cuda.leaf(LAYOUTS[layout](u), *parameters)

    assert gradgradcheck(laid_out, inputs(*GRANULARITIES["no_run"](2, 3, 1, 2), device))


@pytest.mark.parametrize("granularity", ["layer", "no_run", "mixed", "no_p2", "no_p4"])
def test_backward_operator(device, granularity):
    """leaf_backward, called directly on tensors that require gradients."""
    shape, shapes = GRANULARITIES[granularity](2, 3, 2, 1)
    u, *parameters = inputs(shape, shapes, device)
    g = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    def backward(*arguments):
        mask = [True, *(p is not None for p in parameters)]
        return [t for t in torch.ops.leaf_cuda.leaf_backward(*arguments, mask) if t is not None]

    assert gradcheck(backward, (g, u, *parameters))
