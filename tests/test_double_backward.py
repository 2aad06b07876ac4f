"""Gradients of gradients by their own kernel: leaf_double_backward, as one pass over u, grad and v."""

import pytest
import torch
from cases import DTYPE_PAIRS, GRANULARITIES, LAYOUTS, draw, dtype_id, evaluate, plain
from test_accuracy import Pool
from test_func import Calls
from test_memory import peak, size

import leaf_cuda

DOUBLE_BACKWARD = torch.ops.leaf_cuda.leaf_double_backward

RESULTS = ["dgrad", "du", "dp1", "dp2", "dp3"]


def gradients_of_gradients(f, u, parameters, g, v, directions):
    """[dgrad, du, dp1, dp2, dp3] of f by autograd: of (u's gradient)·v + Σ (pq's gradient)·vq."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in (g, u, *parameters)]
    given = [t for t in leaves[1:] if t is not None]
    first = torch.autograd.grad(f(*leaves[1:]), given, leaves[0], create_graph=True)
    wanted = [t for t in leaves[:5] if t is not None]
    second = torch.autograd.grad(first, wanted, [v, *(d for d in directions if d is not None)])
    second = iter(second)
    return [t if t is None else next(second) for t in leaves[:5]]


def draw_all(shape, shapes, **options):
    """u, parameters, g, and a direction of each gradient: v, (v1, ..., v4)."""
    u, parameters, g = draw(shape, shapes, **options)
    v, directions, _ = draw(shape, shapes, **options)
    return u, parameters, g, v, directions


def in_float64(u, parameters, g, v, directions):
    def double(ts):
        return [t if t is None else t.double() for t in ts]

    (u, g, v), parameters, directions = double((u, g, v)), double(parameters), double(directions)
    return u, parameters, g, v, directions


@pytest.mark.parametrize("dtype, parameter_dtype", DTYPE_PAIRS[1:], ids=dtype_id)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_promise_3(device, granularity, dtype, parameter_dtype):
    shape, shapes = GRANULARITIES[granularity](8, 4, 6, 10)
    pools = {}
    for _ in range(32):
        drawn = draw_all(shape, shapes, dtype=dtype, parameter_dtype=parameter_dtype, device=device)
        u, parameters, g, v, directions = drawn
        ours = gradients_of_gradients(leaf_cuda.leaf, *drawn)

        def in_own(tensors):
            return [t if t is None else t.to(dtype) for t in tensors]

        theirs = gradients_of_gradients(plain, u, in_own(parameters), g, v, in_own(directions))
        for name, a, b, true in zip(RESULTS, ours, theirs, gradients_of_gradients(plain, *in_float64(*drawn))):
            assert (a is None) == (true is None)
            if a is not None:
                assert a.shape == true.shape
                pools.setdefault(name, Pool()).add(a, b, true)
    for name, pool in pools.items():
        pool.assert_promise_3(name)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_float64(device, granularity):
    drawn = draw_all(*GRANULARITIES[granularity](3, 5, 4, 7), device=device)
    results, expected = (gradients_of_gradients(f, *drawn) for f in (leaf_cuda.leaf, plain))
    for r, e in zip(results, expected, strict=True):
        torch.testing.assert_close(r, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of_v", ["contiguous", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("of_g", ["contiguous", "channels_last", "expanded", "unaligned"])
@pytest.mark.parametrize("of_u", LAYOUTS)
def test_layouts(device, of_u, of_g, of_v):
    u, parameters, g, v, directions = draw_all(*GRANULARITIES["channel"](3, 5, 4, 6), device=device)
    drawn = LAYOUTS[of_u](u), parameters, LAYOUTS[of_g](g), LAYOUTS[of_v](v), directions
    results, expected = (gradients_of_gradients(f, *drawn) for f in (leaf_cuda.leaf, plain))
    for r, e in zip(results, expected, strict=True):
        torch.testing.assert_close(r, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("repeated", ["neither", "grad", "v", "both"])
@pytest.mark.parametrize("granularity", ["layer", "channel", "features"])
def test_stride_0(device, granularity, repeated):
    """y.sum() and du.sum() send back one element with stride 0, which is read as such."""
    shape, shapes = GRANULARITIES[granularity](3, 5, 4, 7)
    u, parameters, g, v, directions = draw_all(shape, shapes, dtype=torch.float32, device=device)
    one = torch.tensor(0.75, device=device).expand(shape)
    g = one if repeated in ("grad", "both") else g
    v = 2 * one if repeated in ("v", "both") else v
    results = gradients_of_gradients(leaf_cuda.leaf, u, parameters, g, v, directions)
    dense = gradients_of_gradients(leaf_cuda.leaf, u, parameters, g.clone(), v.clone(), directions)
    for r, e in zip(results, dense):
        torch.testing.assert_close(r, e)


def call(drawn, mask=(True,) * 6):
    u, parameters, g, v, directions = drawn
    return DOUBLE_BACKWARD(v, *directions, g, u, *parameters, list(mask))


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("granularity", ["layer", "channel", "element", "mixed", "no_p2"])
def test_masks(device, granularity, layout):
    """Only the results asked for are returned, bitwise as when all are asked for."""
    u, *rest = draw_all(*GRANULARITIES[granularity](3, 5, 4, 6), dtype=torch.float32, device=device)
    drawn = LAYOUTS[layout](u), *rest
    everything = call(drawn)
    assert everything[5] is None
    for k in range(2**5):
        mask = [bool(k >> j & 1) for j in range(5)] + [True]
        for some, whole, wanted in zip(call(drawn, mask), everything, mask):
            assert (some is None) == (whole is None or not wanted)
            assert some is None or torch.equal(some, whole)


def test_missing_directions_are_zeros(device):
    u, parameters, g, v, directions = draw_all(*GRANULARITIES["channel"](3, 5, 4, 6), device=device)
    for k in range(5):
        given = [v, *directions]
        given[k] = None
        zeros = [v, *directions]
        zeros[k] = torch.zeros_like(zeros[k])
        results, expected = (call((u, parameters, g, w[0], w[1:])) for w in (given, zeros))
        assert all(torch.equal(r, e) for r, e in zip(results[:5], expected[:5]))


def test_no_elements(device):
    u, parameters, g, v, directions = draw_all((0, 3, 4, 5), [(3, 1, 1)] * 4, device=device)
    dgrad, du, *dp, dp4 = call((u, parameters, g, v, directions))
    assert dgrad.shape == du.shape == u.shape and dp4 is None
    assert all(torch.equal(d, torch.zeros(3, 1, 1, dtype=torch.float64, device=device)) for d in dp)


@pytest.mark.parametrize("granularity", ["layer", "channel", "features", "element", "mixed"])
def test_number_of_threads(set_threads, granularity):
    drawn = draw_all(*GRANULARITIES[granularity](8, 12, 60, 61), dtype=torch.float32)
    set_threads(1)
    expected = call(drawn)
    for threads in (2, 3):
        set_threads(threads)
        assert all(torch.equal(r, e) for r, e in zip(call(drawn)[:5], expected[:5]))


@pytest.mark.parametrize("route", [leaf_cuda.leaf, leaf_cuda.LeafFunction.apply], ids=["leaf", "LeafFunction"])
def test_gradient_penalty_is_three_passes(route):
    """Forward, backward and the backward of backward: one kernel each, and no other operation on tensors of u's
    size."""
    u, parameters, _ = draw(*GRANULARITIES["channel"](3, 5, 4, 6))
    u, *parameters = (t.requires_grad_() for t in (u, *parameters))
    with Calls() as calls:
        y = route(u, *parameters)
        (du,) = torch.autograd.grad(y, u, torch.ones_like(y), create_graph=True)
        torch.autograd.grad(du, [u, *parameters[:3]], torch.ones_like(du))
    kernels = [n for n in calls.names if n not in ("ones_like", "detach")]
    assert kernels == ["leaf_forward", "leaf_backward", "leaf_double_backward"]


@pytest.mark.parametrize("granularity", ["layer", "channel", "features"])
def test_memory(device, granularity):
    """Allocates dgrad, du, and partial sums within an eighth of u or 1 MiB."""
    drawn = draw_all(*GRANULARITIES[granularity](64, 8, 64, 64), dtype=torch.float32, device=device)
    u = drawn[0]
    assert size(u) == 2**23
    assert 2 * size(u) <= peak(device, lambda: call(drawn)) <= 2 * size(u) + size(u) // 8 + 2**16


def test_gradient_penalty_training(device):
    """With a penalty on the norm of the input's gradient, all weights and parameters get the formula's gradients."""

    def gradients(activation):
        torch.manual_seed(1)
        first, last = torch.nn.Linear(5, 8).double().to(device), torch.nn.Linear(8, 1).double().to(device)
        parameters = [torch.full((8,), x, dtype=torch.float64, device=device) for x in (1.0, 0.1, 1.5, -0.2)]
        parameters = [p.requires_grad_() for p in parameters]
        x = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
        out = last(activation(first(x), *parameters))
        (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss = out.square().mean() + 10 * (dx.norm(dim=1) - 1).square().mean()
        return torch.autograd.grad(loss, [*parameters, *first.parameters(), *last.parameters()])

    for r, e in zip(gradients(leaf_cuda.leaf), gradients(plain), strict=True):
        torch.testing.assert_close(r, e, rtol=1e-10, atol=1e-12)


def test_third_derivatives_are_of_the_same_function(device):
    """If double backward is itself to be differentiated, it runs as PyTorch operations."""
    drawn = draw_all(*GRANULARITIES["channel"](2, 3, 2, 2), device=device)
    leaves = [t.requires_grad_() for t in (drawn[3], *drawn[4], drawn[2], drawn[0], *drawn[1])]
    assert torch.autograd.gradcheck(lambda *a: DOUBLE_BACKWARD(*a, [True] * 6)[:5], leaves)
    with torch.no_grad():
        fused = DOUBLE_BACKWARD(*leaves, [True] * 6)
    for r, e in zip(DOUBLE_BACKWARD(*leaves, [True] * 6)[:5], fused[:5]):
        torch.testing.assert_close(r, e, rtol=1e-12, atol=1e-12)


def test_evaluate_is_unchanged(device):
    """First derivatives with create_graph=True are bitwise those without it."""
    u, parameters, g = draw(*GRANULARITIES["mixed"](3, 5, 4, 6), dtype=torch.float32, device=device)
    expected = evaluate(leaf_cuda.leaf, u, parameters, g)[1:]
    leaves = [t.detach().requires_grad_() for t in (u, *parameters)]
    results = torch.autograd.grad(leaf_cuda.leaf(*leaves), leaves, g, create_graph=True)
    assert all(torch.equal(r, e) for r, e in zip(results, expected))
