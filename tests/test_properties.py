"""The truth up to rounding, for shapes, layouts, dtypes, parameter shapes and wanted gradients drawn by hypothesis."""

import pytest
import torch
from cases import DTYPE_PAIRS, assert_true, plain

import leaf_cuda

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SETTINGS = hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,  # the same examples on every run: a failure is reproducible
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@st.composite
def tensors(draw, shape, dtype):
    """A tensor of the given shape in any layout: permuted in memory, with gaps, offset, expanded."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    expanded = [draw(st.sampled_from([False, False, False, True])) for _ in shape]
    offset = draw(st.sampled_from([0, 0, 1, 3]))
    spread = [(1 if e else n) * s for n, s, e in zip(shape, steps, expanded)]
    count = torch.Size([spread[d] for d in order]).numel()
    memory = torch.randn(offset + count).to(dtype)[offset:].view([spread[d] for d in order])
    t = memory.permute([order.index(d) for d in range(len(shape))])
    return t[tuple(slice(None, None, s) for s in steps)].expand(shape)


@st.composite
def arguments(draw, pairs=DTYPE_PAIRS):
    """u, [p1, ..., p4], g and, for each of u, p1, ..., p4, whether its gradient is wanted."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, parameter_dtype = draw(st.sampled_from(pairs))
    sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 17, 33])
    shape = draw(st.lists(sizes, max_size=4).filter(lambda s: torch.Size(s).numel() <= 20_000))

    def parameter(optional):
        if optional and draw(st.integers(0, 3)) == 0:
            return None
        own = [n if draw(st.booleans()) else 1 for n in shape]
        own = own[draw(st.integers(0, len(own))) :]
        if len(own) == len(shape) and draw(st.integers(0, 7)) == 0:
            own = [1, *own]
        return draw(tensors(own, parameter_dtype))

    parameters = [parameter(optional) for optional in (False, True, False, True)]
    wanted = draw(st.tuples(*[st.booleans()] * 5).filter(any))
    return draw(tensors(shape, dtype)), parameters, draw(tensors(shape, dtype)), wanted


@hypothesis.given(arguments())
@SETTINGS
def test_truth(device, drawn):
    u, parameters, g, wanted = drawn
    u, g = u.to(device), g.to(device)
    parameters = [None if p is None else p.to(device) for p in parameters]
    leaves = [t if t is None else t.detach().requires_grad_(w) for t, w in zip((u, *parameters), wanted)]
    y = leaf_cuda.leaf(*leaves)
    assert (y.shape, y.dtype) == (u.shape, u.dtype)
    assert y.stride() == torch.empty_like(u).stride()
    asked = [t for t in leaves if t is not None and t.requires_grad]
    gradients = iter(torch.autograd.grad(y, asked, g) if asked else ())
    results = [y.detach(), *(next(gradients) if t is not None and t.requires_grad else None for t in leaves)]
    assert_true(results, u, parameters, g, (True, *wanted))
    assert all(r is None or t is None or r.dtype == t.dtype for r, t in zip(results[1:], leaves))


@hypothesis.given(arguments(DTYPE_PAIRS[:1]), st.booleans(), st.data())
@SETTINGS
def test_gated_unit(device, drawn, packed, data):
    """leaf_glu of two tensors and of a packed one, in float64: the formula's results."""
    a, parameters, g, wanted = drawn
    if a.dim() == 0 and packed:
        return
    if packed:
        x = data.draw(tensors((*a.shape[:-1], 2 * a.size(-1)), a.dtype))
        gate = (x.to(device), None)
    else:
        gate = (a.to(device), data.draw(tensors(a.shape, a.dtype)).to(device))
    parameters = [None if p is None else p.to(device) for p in parameters]
    wanted = (wanted[0], wanted[0], *wanted[1:])
    leaves = [t if t is None else t.detach().requires_grad_(w) for t, w in zip((*gate, *parameters), wanted)]
    asked = [t for t in leaves if t is not None and t.requires_grad]

    def formula(a, b, *parameters):
        if b is None:
            a, b = a.chunk(2, -1)
        # A parameter may begin with 1s beyond a's dimensions, which y has not.
        return (plain(a, *parameters) * b).reshape(a.shape)

    results, expected = (
        [y.detach(), *(torch.autograd.grad(y, asked, g.to(device)) if asked else ())]
        for y in (f(*leaves) for f in (leaf_cuda.leaf_glu, formula))
    )
    for r, e in zip(results, expected, strict=True):
        torch.testing.assert_close(r, e, rtol=1e-10, atol=1e-10)
