"""Promises 4 and 6: every dtype, shape and layout; y and du as PyTorch's own element-wise operators lay them out."""

import random

import pytest
import torch
from cases import DTYPE_PAIRS, DTYPES, GRANULARITIES, LAYOUTS, assert_true, draw, dtype_id, evaluate

import leaf_cuda


def strides(t):
    """The strides of dimensions of more than one element: those of others say nothing about where elements lie."""
    return [s for s, n in zip(t.stride(), t.shape) if n != 1] if t.numel() else None


def assert_laid_out_as_torch(y, du, u):
    u = u.detach().requires_grad_()
    of_torch = torch.sigmoid(u)
    (gradient,) = torch.autograd.grad(of_torch, u, torch.ones_like(of_torch))
    assert strides(y) == strides(of_torch)
    assert strides(du) == strides(gradient)


def check(u, parameters, g):
    results = evaluate(leaf_cuda.leaf, u, parameters, g)
    assert results[0].dtype == results[1].dtype == u.dtype
    assert all(d is None or d.dtype == p.dtype for d, p in zip(results[2:], parameters))
    assert_true(results, u, parameters, g)
    assert_laid_out_as_torch(*results[:2], u)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype, parameter_dtype", DTYPE_PAIRS, ids=dtype_id)
def test_dtypes(device, dtype, parameter_dtype, granularity):
    shape, shapes = GRANULARITIES[granularity](3, 5, 4, 7)
    check(*draw(shape, shapes, dtype=dtype, parameter_dtype=parameter_dtype, device=device))


@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_u", LAYOUTS)
@pytest.mark.parametrize("granularity", ["layer", "channel", "element", "no_run", "mixed"])
def test_layouts_of_u_and_the_gradient(device, granularity, of_u, of_gradient):
    u, parameters, g = draw(*GRANULARITIES[granularity](3, 5, 4, 6), dtype=torch.float32, device=device)
    check(LAYOUTS[of_u](u), parameters, LAYOUTS[of_gradient](g))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded"])
@pytest.mark.parametrize("granularity", ["layer", "channel", "element", "no_run", "mixed"])
def test_gradient_of_a_sum(device, granularity, layout):
    """y.sum().backward() sends one element with stride 0 in every dimension; a sum over the batch has stride 0 in the
    first."""
    u, parameters, _ = draw(*GRANULARITIES[granularity](3, 5, 4, 6), dtype=torch.float32, device=device)
    u = LAYOUTS[layout](u)
    check(u, parameters, torch.tensor(0.75, device=device).expand(u.shape))
    check(u, parameters, torch.randn(u.shape[1:], device=device).expand(u.shape))
    check(u, parameters, torch.randn(u.shape[:-1], device=device).unsqueeze(-1).expand(u.shape))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "channels_last", "unaligned"])
def test_layouts_of_parameters(device, layout):
    u, parameters, g = draw((2, 3, 4, 6), [(1, 3, 4, 6), (2, 3, 4, 6), (2, 3, 4, 1), (3, 1, 6)], device=device)
    laid_out = [LAYOUTS[layout](p) if p.dim() == 4 else p for p in parameters]
    check(u, laid_out, g)


def test_channels_last_3d(device):
    u, parameters, g = draw((2, 5, 3, 4, 2), [(5, 1, 1, 1)] * 4, dtype=torch.float32, device=device)
    u = u.contiguous(memory_format=torch.channels_last_3d)
    check(u, parameters, g)
    assert leaf_cuda.leaf(u, *parameters).is_contiguous(memory_format=torch.channels_last_3d)


def test_channels_last(device):
    u, parameters, g = draw((2, 5, 3, 4), [(5, 1, 1)] * 4, dtype=torch.float32, device=device)
    u = u.contiguous(memory_format=torch.channels_last)
    for t in evaluate(leaf_cuda.leaf, u, parameters, g)[:2]:
        assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


@pytest.mark.parametrize("dim", range(9))
def test_numbers_of_dimensions(device, dim):
    shape = [2, 3, 1, 2, 1, 3, 2, 2][:dim]
    draws = random.Random(dim)
    for shapes in (
        [(1,)] * 4,
        [()] * 4,
        [shape[-1:]] * 4,
        [shape] * 4,
        [[n if draws.random() < 0.5 else 1 for n in shape[draws.randint(0, dim) :]] for _ in range(4)],
    ):
        check(*draw(shape, shapes, device=device))


def test_random_views(device):
    """Permuted, sliced, strided and expanded tensors, also with dimensions of one element or none, in all combinations:
    u, the gradient and, in every other draw, the parameters."""
    draws = random.Random(0)
    for draw_number in range(400):
        dim = draws.randint(1, 5)
        sizes = [draws.choice([1, 2, 3, 4, 0 if draws.random() < 0.1 else 5]) for _ in range(dim)]

        def view(sizes):
            dim = len(sizes)
            order = draws.sample(range(dim), dim)
            steps = [draws.choice([1, 1, 2]) for _ in range(dim)]
            repeated = [draws.random() < 0.15 for _ in range(dim)]
            whole = torch.randn([1 if repeated[d] else sizes[d] * steps[d] + 1 for d in order], dtype=torch.float64)
            t = whole.to(device).permute([order.index(d) for d in range(dim)])
            t = t[tuple(slice(None) if repeated[d] else slice(1, None, steps[d]) for d in range(dim))]
            return t.expand(sizes)

        shapes = [[n if draws.random() < 0.5 else 1 for n in sizes[draws.randint(0, dim) :]] for _ in range(4)]
        if draws.random() < 0.3:  # all of one shape, as in a module
            shapes = shapes[:1] * 4
        plain = [torch.randn(s, dtype=torch.float64, device=device) for s in shapes]
        parameters = plain if draw_number % 2 else [view(s) for s in shapes]
        check(view(sizes), parameters, view(sizes))


@pytest.mark.parametrize(
    "shape, parameter_shape",
    [
        ((0,), (1,)),
        ((0,), (0,)),
        ((0, 3), (3,)),
        ((3, 0), (1,)),
        ((3, 0), (0,)),
        ((3, 0), (3, 1)),
        ((2, 3, 0, 4), (3, 1, 1)),
        ((2, 3, 0, 4), (3, 0, 4)),
        ((2, 3, 0, 4), (3, 1, 4)),
        ((0, 3, 2, 4), (3, 2, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_no_elements(device, dtype, shape, parameter_shape):
    u, parameters, g = draw(shape, [parameter_shape] * 4, dtype=dtype, device=device)
    y, du, *dp = evaluate(leaf_cuda.leaf, u, parameters, g)
    assert y.shape == du.shape == u.shape
    assert all(torch.equal(d, torch.zeros_like(p)) for d, p in zip(dp, parameters))


LENGTHS = [*range(1, 41), 63, 64, 65, 127, 128, 129, 130, 223, 224, 225, 1000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("rows", [1, 3, 37])
def test_inner_lengths(device, rows, dtype):
    """Runs of `inner` elements share a parameter."""
    for inner in LENGTHS:
        for channels in (1, 3, 16):
            shape, shapes = (rows, channels, inner), [(channels, 1)] * 4
            if rows * channels * inner <= 20_000:
                check(*draw(shape, shapes, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("rows", [1, 2, 5, 67, 131])
def test_counts_of_parameters(device, rows, dtype):
    """`count` parameters, one for each element of a row."""
    for count in LENGTHS:
        if rows * count <= 20_000:
            check(*draw((rows, count), [(count,)] * 4, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_unaligned_starts(device, dtype):
    """u, g and the parameters at every offset from an aligned address."""
    for offset in range(9):

        def at_offset(t):
            return torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)

        for shape, size in [((3, 67), (67,)), ((2, 4, 131), (4, 1)), ((301,), (1,))]:
            u, parameters, g = draw(shape, [size] * 4, dtype=dtype, device=device)
            check(at_offset(u), [at_offset(p) for p in parameters], at_offset(g))
            check(at_offset(u), parameters, g)
            check(u, parameters, at_offset(g))


@pytest.mark.parametrize(
    "shape, shapes",
    [
        ((64, 3, 57, 59), [(3, 1, 1)] * 4),
        ((40, 67, 14, 14), [(67, 1, 1)] * 4),
        ((257, 1_029), [(1_029,)] * 4),
        ((3, 100_003), [(100_003,)] * 4),
        ((700_001,), [(1,)] * 4),
        ((30_011, 17), [(17,)] * 4),
        ((5, 64, 33, 31), [(64, 1, 31), (1,), (33, 1), (64, 33, 31)]),
        ((2, 70_001), [(1,), (70_001,), (2, 1), (70_001,)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_many_tasks(set_threads, shape, shapes, layout):
    set_threads(3)
    u, parameters, g = draw(shape, shapes, dtype=torch.float32)
    check(LAYOUTS[layout](u) if len(shape) > 1 else u, parameters, g)
