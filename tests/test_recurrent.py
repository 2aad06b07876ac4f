"""LeafLSTM, LeafGRU and their cells: they equal torch's own at the start, and the formula with any parameters."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPE_PAIRS, dtype_id, plain
from test_accuracy import Pool
from test_func import Calls
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import leaf_cuda
from leaf_cuda.nn import CellLEAF, LeafGRU, LeafGRUCell, LeafLSTM, LeafLSTMCell

FORWARD, BACKWARD = torch.ops.leaf_cuda.leaf_recurrent_forward, torch.ops.leaf_cuda.leaf_recurrent_backward

LAYERS = {"LSTM": (LeafLSTM, nn.LSTM), "GRU": (LeafGRU, nn.GRU)}
CELLS = {"LSTM": (LeafLSTMCell, nn.LSTMCell), "GRU": (LeafGRUCell, nn.GRUCell)}
SETS = {"LSTM": 5, "GRU": 3}
KINDS = list(LAYERS)

OPTIONS = {
    "plain": {},
    "two_layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "all": {"num_layers": 3, "bidirectional": True, "batch_first": True},
    "no_bias": {"bias": False, "bidirectional": True},
}

float64 = {"dtype": torch.float64}


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def randomised(module, scale=0.3):
    """The module with LEAF's parameters moved away from their initial form."""
    with torch.no_grad():
        for leaf in module.modules():
            if isinstance(leaf, CellLEAF):
                for p in leaf.parameters():
                    p.add_(scale * torch.randn(p.shape).to(p))
    return module


# ---- the layer as a user of PyTorch writes it ------------------------------------------------------------------------


def step(kind, x, states, w_ih, w_hh, b_ih, b_hh, parameters):
    def act(k, u):
        return plain(u, *(p[k] for p in parameters))

    by_x, by_h = F.linear(x, w_ih, b_ih), F.linear(states[0], w_hh, b_hh)
    if kind == "LSTM":
        i, f, g, o = (by_x + by_h).chunk(4, -1)
        c = act(1, f) * states[1] + act(0, i) * act(2, g)
        return act(3, o) * act(4, c), c
    (r, z, n), (r_h, z_h, n_h) = by_x.chunk(3, -1), by_h.chunk(3, -1)
    new, z = act(2, n + act(0, r + r_h) * n_h), act(1, z + z_h)
    return ((1 - z) * new + z * states[0],)


def formula(kind, x, states, *rest, batch_sizes=None, reverse=False):
    """output and the last states; x is (steps, batch, features) or, with batch_sizes, (rows, features)."""
    *weights, p1, p2, p3, p4 = rest
    steps = list(x) if batch_sizes is None else x.split(batch_sizes.tolist())
    outputs = [None] * len(steps)
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        n = len(steps[t])
        new = step(kind, steps[t], [s[:n] for s in states], *weights, (p1, p2, p3, p4))
        states = [torch.cat([a, b[n:]]) for a, b in zip(new, states)]
        outputs[t] = new[0]
    return (torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)), *states


def fused(kind, x, states, *rest, batch_sizes=None, reverse=False):
    c = states[1] if kind == "LSTM" else None
    return FORWARD(x, states[0], c, *rest, batch_sizes, reverse)[: 1 + len(states)]


def draw(
    kind, steps, batch, hidden, features=4, per_unit=True, dtype=torch.float64, parameter_dtype=None, device="cpu"
):
    """x, states, and [weights, biases, parameters]; for many steps, parameters with which the states stay bounded."""
    gates = {"LSTM": 4, "GRU": 3}[kind]

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape)).to(device, dtype)

    weights = [
        normal(gates * hidden, features, scale=features**-0.5),
        normal(gates * hidden, hidden, scale=hidden**-0.5),
        normal(gates * hidden),
        normal(gates * hidden),
    ]
    p_dtype, spread = parameter_dtype or dtype, 0.5 if steps < 50 else 0.05
    parameters = [
        (torch.randn(SETS[kind], hidden if per_unit else 1) * spread + c).to(device, p_dtype) for c in (0, 1, 1, 0)
    ]
    states = [normal(batch, hidden) for _ in range({"LSTM": 2, "GRU": 1}[kind])]
    return normal(steps, batch, features), states, [*weights, *parameters]


def evaluate(f, kind, x, states, rest, grads=None, **how):
    """Output, last states, and the gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in (x, *states, *(r for r in rest if r is not None))]
    own = iter(leaves[1 + len(states) :])
    rest = [None if r is None else next(own) for r in rest]
    results = f(kind, leaves[0], leaves[1 : 1 + len(states)], *rest, **how)
    grads = grads or [torch.ones_like(r) for r in results]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, grads)]


def assert_same(results, expected, tolerance=1e-10):
    assert len(results) == len(expected)
    for k, (r, e) in enumerate(zip(results, expected)):
        assert r.shape == e.shape
        torch.testing.assert_close(r, e, rtol=tolerance, atol=tolerance, msg=lambda m, k=k: f"result {k}: {m}")


# ---- at the start: torch's ---------------------------------------------------------------------------------------------


def inputs(kind, options, features, layout):
    """input and hx, for a hidden size of 7"""
    count = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    if layout == "packed":
        x = pack_sequence([torch.randn(n, features, **float64) for n in (3, 6, 1, 4)], enforce_sorted=False)
        shape = (count, 4, 7)
    elif layout == "unbatched":
        x, shape = torch.randn(5, features, **float64), (count, 7)
    else:
        x, shape = torch.randn(*((3, 5) if options.get("batch_first") else (5, 3)), features, **float64), (count, 3, 7)
    states = tuple(torch.randn(shape, **float64) for _ in range(2 if kind == "LSTM" else 1))
    return x, states if kind == "LSTM" else states[0]


def everything(module, x, hx):
    """output, last states, all gradients"""
    data = (x.data if isinstance(x, PackedSequence) else x).detach().requires_grad_()
    given = PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data
    states = () if hx is None else tuple(s.detach().requires_grad_() for s in as_tuple(hx))
    output, last = module(given, None if hx is None else states if isinstance(hx, tuple) else states[0])
    assert isinstance(output, PackedSequence) == isinstance(x, PackedSequence)
    output = output.data if isinstance(output, PackedSequence) else output
    loss = output.sin().sum() + sum((k + 2) * s.cos().sum() for k, s in enumerate(as_tuple(last)))
    weights = [p for name, p in module.named_parameters() if "leaf" not in name]
    return [output, *as_tuple(last), *torch.autograd.grad(loss, [data, *states, *weights])]


@pytest.mark.parametrize("per_unit", [False, True])
@pytest.mark.parametrize("layout", ["batched", "unbatched", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_begins_as_torchs(device, kind, options, layout, per_unit):
    ours, theirs = LAYERS[kind]
    fixed = theirs(5, 7, **OPTIONS[options], **float64).to(device)
    learned = ours(5, 7, **OPTIONS[options], per_unit=per_unit, **float64).to(device)
    learned.load_state_dict(fixed.state_dict(), strict=True)
    x, hx = inputs(kind, OPTIONS[options], 5, layout)
    x, hx = x.to(device), tuple(s.to(device) for s in hx) if isinstance(hx, tuple) else hx.to(device)
    for given in (hx, None):
        assert_same(everything(learned, x, given), everything(fixed, x, given), 1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_cells_begin_as_torchs(device, kind, bias):
    ours, theirs = CELLS[kind]
    fixed = theirs(5, 7, bias=bias, **float64).to(device)
    learned = ours(5, 7, bias=bias, per_unit=True, **float64).to(device)
    learned.load_state_dict(fixed.state_dict(), strict=True)
    for shape in ((3,), ()):
        x = torch.randn(*shape, 5, **float64, device=device, requires_grad=True)
        states = [torch.randn(*shape, 7, **float64, device=device) for _ in range(SETS[kind] // 2)]
        for hx in (None, tuple(states) if kind == "LSTM" else states[0]):
            for module in (learned, fixed):
                module.zero_grad()
            results = [as_tuple(module(x, hx)) for module in (learned, fixed)]
            gradients = [
                torch.autograd.grad(
                    sum(r.sin().sum() for r in result),
                    [x, *(p for n, p in module.named_parameters() if not n.startswith("leaf"))],
                )
                for result, module in zip(results, (learned, fixed))
            ]
            assert_same(results[0], results[1], 1e-12)
            assert_same(gradients[0], gradients[1], 1e-12)


def test_dropout(device):
    """Between the layers and only in training, as in torch."""
    fixed, learned = (C(5, 7, num_layers=3, dropout=0.5, **float64).to(device) for C in (nn.LSTM, LeafLSTM))
    learned.load_state_dict(fixed.state_dict())
    x = torch.randn(4, 3, 5, **float64, device=device)
    first = learned(x)[0]
    assert not torch.equal(first, learned(x)[0])
    torch.testing.assert_close(learned.eval()(x)[0], fixed.eval()(x)[0], rtol=0, atol=1e-12)


# ---- any parameters: the formula ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("per_unit", [False, True])
@pytest.mark.parametrize(
    "steps, batch, hidden",
    [(1, 1, 1), (4, 3, 5), (3, 2, 16), (2, 5, 17), (3, 130, 40), (2, 3, 700), (70, 2, 3), (2, 300, 33)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_formula(device, kind, steps, batch, hidden, per_unit, reverse):
    x, states, rest = draw(kind, steps, batch, hidden, per_unit=per_unit, device=device)
    how = {"reverse": reverse}
    expected = evaluate(formula, kind, x, states, rest, **how)
    assert_same(evaluate(fused, kind, x, states, rest, **how), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [[3], [3, 3, 2, 1, 1], [4, 1], [5, 4, 3, 3]])
@pytest.mark.parametrize("kind", KINDS)
def test_packed(device, kind, sizes, reverse):
    x, states, rest = draw(kind, sum(sizes), 1, 6, device=device)
    _, states, _ = draw(kind, 1, sizes[0], 6, device=device)
    how = {"batch_sizes": torch.tensor(sizes), "reverse": reverse}
    expected = evaluate(formula, kind, x[:, 0], states, rest, **how)
    assert_same(evaluate(fused, kind, x[:, 0], states, rest, **how), expected)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.1)], ids=dtype_id)
@pytest.mark.parametrize("sizes", [[6] * 7, [6, 6, 5, 3, 3, 2, 1]], ids=["unpacked", "packed"])
@pytest.mark.parametrize("features, hidden", [(8, 40), (24, 512)])
@pytest.mark.parametrize("kind", KINDS)
def test_products(device, kind, features, hidden, sizes, dtype, tolerance, onednn):
    """All results and gradients against float64 from the same numbers; in float32, oneDNN computes the large products,
    if enabled. Errors are those of the products and the states, relative to a tensor's largest number."""
    x, states, rest = draw(kind, sum(sizes), 1, hidden, features=features, dtype=dtype, device=device)
    _, states, _ = draw(kind, 1, sizes[0], hidden, dtype=dtype, device=device)
    rest = [*rest[:4], *(0.3 * (p - c) + c for p, c in zip(rest[4:], (0, 1, 1, 0)))]
    x, how = x[:, 0], {"batch_sizes": torch.tensor(sizes), "reverse": True}
    with torch.backends.mkldnn.flags(enabled=onednn), torch.autograd.profiler.profile() as profile:
        ours = evaluate(fused, kind, x, states, rest, **how)
    by_onednn = any(event.name == "mkldnn::_linear_pointwise" for event in profile.function_events)
    available = torch.backends.mkldnn.is_available() and device == "cpu"
    assert by_onednn == (available and onednn and dtype == torch.float32 and hidden == 512)
    true = evaluate(formula, kind, x.double(), [s.double() for s in states], [r.double() for r in rest], **how)
    for k, (r, e) in enumerate(zip(ours, true, strict=True)):
        assert (r.double() - e).abs().max() <= tolerance * (1 + e.abs().max()), f"result {k}"


@pytest.mark.parametrize("used", ["output", "h_n", "c_n"])
def test_of_one_result(device, used):
    """Only one of the results is used, so the others have no gradient."""
    x, states, rest = draw("LSTM", 3, 4, 5, device=device)
    k = ["output", "h_n", "c_n"].index(used)
    leaves = [t.detach().requires_grad_() for t in (x, *states, *rest)]
    results = [
        torch.autograd.grad(f("LSTM", leaves[0], leaves[1:3], *leaves[3:])[k].sin().sum(), leaves, allow_unused=True)
        for f in (fused, formula)
    ]
    results = [[torch.zeros_like(t) if d is None else d for t, d in zip(leaves, result)] for result in results]
    assert_same(*results)


def test_no_biases_and_no_batch(device):
    for kind in KINDS:
        x, states, rest = draw(kind, 3, 4, 5, device=device)
        rest[2] = None
        assert_same(evaluate(fused, kind, x, states, rest), evaluate(formula, kind, x, states, rest))
        rest[3] = None
        assert_same(evaluate(fused, kind, x, states, rest), evaluate(formula, kind, x, states, rest))
        for batch, features in ((0, 4), (3, 0)):
            x, states, rest = draw(kind, 3, batch, 5, features=features or 1, device=device)
            x, rest[0] = x[..., :features], rest[0][:, :features]
            assert_same(evaluate(fused, kind, x, states, rest), evaluate(formula, kind, x, states, rest))


@pytest.mark.parametrize("kind", KINDS)
def test_no_batch_of_many_units(kind):
    """In float32: oneDNN may compute such products."""
    x, states, rest = draw(kind, 8, 0, 512, dtype=torch.float32)
    assert_same(evaluate(fused, kind, x, states, rest), evaluate(formula, kind, x, states, rest))


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(device, kind):
    """Tensors with gaps, transposed, and with stride 0."""
    x, states, rest = draw(kind, 4, 3, 5, device=device)
    expected = evaluate(formula, kind, x, states, rest)
    gaps = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, *states, *rest)]
    turned = [t.t().contiguous().t() if t.dim() == 2 else t for t in (x, *states, *rest)]
    turned[0] = x.transpose(0, 1).contiguous().transpose(0, 1)
    n = 1 + len(states)
    for given in (gaps, turned):
        assert_same(evaluate(fused, kind, given[0], given[1:n], given[n:]), expected)
    rows = [t[:1].expand(t.shape) for t in (x, *states, *rest)]
    grads = [torch.randn((), **float64, device=device).expand(t.shape) for t in (torch.empty(4, 3, 5), *states)]
    expected = evaluate(formula, kind, rows[0], rows[1:n], rows[n:], grads)
    assert_same(evaluate(fused, kind, rows[0], rows[1:n], rows[n:], grads), expected)
    copies = [t.clone() for t in (x, *states)]
    evaluate(fused, kind, x, states, rest)
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, *states)))


@pytest.mark.parametrize("mkldnn", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_biases_of_any_stride(kind, mkldnn):
    """In float32, since oneDNN, which computes this product with AVX-512 only, ignores strides. Only one of the two
    biases is given at a time: a single one is taken as it lies."""
    x, states, rest = draw(kind, 4, 3, 64, features=400, dtype=torch.float32)
    n = len(rest[2])
    biases = {"step": torch.randn(2 * n)[::2], "column": torch.randn(n, 3)[:, 1], "expanded": torch.randn(1).expand(n)}
    for own, other in ((2, 3), (3, 2)):
        for bias in biases.values():
            with torch.backends.mkldnn.flags(enabled=mkldnn):
                rest[own], rest[other] = bias, None
                results = evaluate(fused, kind, x, states, rest)
                rest[own] = bias.contiguous()
                assert_same(results, evaluate(fused, kind, x, states, rest), 0)


def pointwise(kind, batch, hidden, dtype, parameter_dtype, device):
    """A single step whose pre-activations no product rounds: x's weights are the identity, h's are zeros."""
    gates = {"LSTM": 4, "GRU": 3}[kind]
    x, states, rest = draw(kind, 1, batch, hidden, gates * hidden, True, dtype, parameter_dtype, device)
    rest[0], rest[1] = torch.eye(gates * hidden, device=device, dtype=dtype), torch.zeros_like(rest[1])
    rest[2] = torch.zeros_like(rest[2])
    if kind == "LSTM":
        rest[3] = torch.zeros_like(rest[3])
    else:
        rest[3][: 2 * hidden] = 0
    return x, states, rest


@pytest.mark.parametrize("dtype, parameter_dtype", DTYPE_PAIRS[1:], ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_promise_3(device, kind, dtype, parameter_dtype):
    """Promise 3 for what the fused passes compute: output, c, and the gradients of pre-activations, c and LEAF's
    parameters."""
    pools = {}
    for _ in range(32):
        x, states, rest = pointwise(kind, 24, 9, dtype, parameter_dtype, device)
        grads = [torch.randn(s, device=device).to(dtype) for s in [(1, 24, 9)] + [(24, 9)] * len(states)]
        grads[1] = torch.zeros_like(grads[1])  # else h' would get the rounded sum of two gradients
        ours = evaluate(fused, kind, x, states, rest, grads)
        low = [t.to(dtype) for t in rest]
        theirs = evaluate(formula, kind, x, states, low, grads)
        double = [t.double() for t in rest]
        true = evaluate(formula, kind, x.double(), [s.double() for s in states], double, [g.double() for g in grads])
        n = len(states)
        # Only the pass rounds these: results, dx, dc, and dp1 ... dp4.
        for k in [*range(1 + n), 1 + n, *([3 + n] if n == 2 else []), *range(-4, 0)]:
            pools.setdefault(k, Pool()).add(ours[k], theirs[k], true[k])
    for k, pool in pools.items():
        pool.assert_promise_3(f"result {k}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch, hidden", [(32, 256), (300, 70), (1000, 3), (5, 1500)])
def test_threads_and_runs(set_threads, kind, batch, hidden):
    """The passes' results are bitwise the same, whatever the number of threads."""
    x, states, rest = draw(kind, 1, batch, hidden, 1, True, torch.float32)
    rest[1] = torch.zeros_like(rest[1])
    grads = [torch.randn(s) for s in [(1, batch, hidden)] + [(batch, hidden)] * len(states)]
    results = []
    for threads in (1, 2, 3, 1):
        set_threads(threads)
        results.append(evaluate(fused, kind, x, states, rest, grads))
    passes = [*range(1 + len(states)), *range(-4, 0)]
    assert all(torch.equal(again[k], results[0][k]) for again in results[1:] for k in passes)


def test_many_steps_of_sums(device):
    """More steps than there is room for partial sums."""
    x, states, rest = draw("LSTM", 200, 3, 4, device=device)
    assert_same(evaluate(fused, "LSTM", x, states, rest), evaluate(formula, "LSTM", x, states, rest), tolerance=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_masks(device, kind):
    x, states, rest = draw(kind, 3, 4, 5, device=device)
    c = states[1] if kind == "LSTM" else None
    given = (x, states[0], c, *rest)
    output, h_n, c_n, cells, pre = FORWARD(*given, None, False)
    grads = torch.randn_like(output), torch.randn_like(h_n), torch.randn_like(c_n) if c is not None else None
    everything = BACKWARD(*grads, output, cells, pre, *given, None, False, [True] * 11)
    for t, d in zip(given, everything):
        assert (t is None) == (d is None) and (t is None or t.shape == d.shape)
    storages = [d.untyped_storage().data_ptr() for d in everything if d is not None]
    assert len(set(storages)) == len(storages)
    for k in range(0, 2**11, 7):
        mask = [bool(k >> j & 1) for j in range(11)]
        some = BACKWARD(*grads, output, cells, pre, *given, None, False, mask)
        for s, whole, wanted in zip(some, everything, mask):
            assert (s is None) == (whole is None or not wanted)
            assert s is None or torch.equal(s, whole)


def test_one_pass_each():
    module = LeafLSTM(4, 5)
    x = torch.randn(7, 3, 4)
    with Calls() as calls:
        module(x)[0].sum().backward()
    ours = [n for n in calls.names if n.startswith("leaf")]
    assert ours == ["leaf_recurrent_forward", "leaf_recurrent_backward"]


# ---- autograd, torch.func, compilers -----------------------------------------------------------------------------------


def flat(kind, **how):
    n = len(draw(kind, 1, 1, 1)[1])
    return lambda x, *rest: fused(kind, x, rest[:n], *rest[n:], **how)


@pytest.mark.parametrize("sizes", [None, [3, 2]], ids=["unpacked", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(device, kind, sizes):
    x, states, rest = draw(kind, 2, 3, 2, features=2, device=device)
    how = {} if sizes is None else {"batch_sizes": torch.tensor(sizes), "reverse": True}
    if sizes:
        x = x.flatten(0, 1)[: sum(sizes)]
    leaves = [t.requires_grad_() for t in (x, *states, *rest)]
    function = flat(kind, **how)
    assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


def test_one_tensor_as_two(device):
    """One tensor as h and as c: both uses count, in gradients of gradients too."""
    x, states, rest = draw("LSTM", 2, 3, 2, features=2, device=device)
    s = states[0].requires_grad_()
    for f in (fused, formula):
        (d,) = torch.autograd.grad(f("LSTM", x, [s, s], *rest)[0].sin().sum(), s, create_graph=True)
        (dd,) = torch.autograd.grad(d.sin().sum(), s)
        if f is fused:
            ours = d.detach(), dd
    assert_same(ours, (d.detach(), dd))


@pytest.mark.parametrize("kind", KINDS)
def test_func(device, kind):
    module = randomised(LAYERS[kind][0](3, 4, per_unit=True, **float64).to(device))
    x = torch.randn(5, 2, 3, **float64, device=device)
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return functional_call(module, parameters, (x,))[0].sin().sum()

    expected = dict(zip(parameters, torch.autograd.grad(loss(parameters, x), list(parameters.values()))))
    got = grad(loss)({k: v.detach() for k, v in parameters.items()}, x)
    assert_same([got[k] for k in expected], list(expected.values()))
    per_sample = vmap(grad(loss), (None, 1))({k: v.detach() for k, v in parameters.items()}, x[:, :, None])
    assert_same([per_sample[k].sum(0) for k in expected], list(expected.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_tangents(device, kind):
    x, states, rest = draw(kind, 3, 2, 4, device=device)
    v = torch.randn_like(x)
    with forward_ad.dual_level():
        results = fused(kind, forward_ad.make_dual(x, v), states, *rest)
        got = [forward_ad.unpack_dual(r).tangent for r in results]
        expected = formula(kind, forward_ad.make_dual(x, v), states, *rest)
        assert_same(got, [forward_ad.unpack_dual(r).tangent for r in expected])


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_the_operator_alone(kind):
    """Also if it runs as PyTorch operations."""
    x, states, rest = draw(kind, 3, 2, 4, dtype=torch.float32)
    v = torch.randn_like(x)

    def second_order():
        leaf = x.detach().requires_grad_()
        (d,) = torch.autograd.grad(fused(kind, leaf, states, *rest)[0].sin().sum(), leaf, create_graph=True)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(fused(kind, forward_ad.make_dual(x, v), states, *rest)[0]).tangent
        with torch.autocast("cpu", enabled=False):  # autograd's own products would be autocast
            return [tangent, d.detach(), *torch.autograd.grad(d.square().sum(), leaf)]

    expected = second_order()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(r, e) for r, e in zip(second_order(), expected))


def test_vmap():
    module = randomised(LeafGRU(3, 4, **float64))
    x = torch.randn(2, 5, 1, 3, **float64)
    with torch.no_grad():
        torch.testing.assert_close(vmap(lambda x: module(x)[0])(x), torch.stack([module(x)[0] for x in x]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, dtype, needed, packed):
    x, states, rest = draw(kind, 3, 4, 5, dtype=dtype)
    sizes = torch.tensor([4, 3]) if packed else None
    x = x.flatten(0, 1)[:7] if packed else x
    c = states[1] if kind == "LSTM" else None
    given = [t if t is None else t.detach().requires_grad_(needed) for t in (x, states[0], c, *rest)]
    torch.library.opcheck(FORWARD, (*given, sizes, False))
    given = [t if t is None else t.detach() for t in given]
    output, h_n, _, cells, pre = FORWARD(*given, sizes, False)
    arguments = (torch.ones_like(output), None, None, output, cells, pre, *given, sizes, False, [True] * 11)
    torch.library.opcheck(BACKWARD, arguments)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_compile(backend, kind):
    torch._dynamo.reset()
    module = randomised(LAYERS[kind][0](3, 4, num_layers=2, bidirectional=True, batch_first=True, **float64))
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for batch, steps in ((2, 5), (3, 5), (4, 6)):
        x = torch.randn(batch, steps, 3, **float64)
        results = [everything(m, x, None) for m in (compiled, module)]
        assert_same(*results)


def test_compiled_cell():
    torch._dynamo.reset()
    cell = randomised(LeafGRUCell(3, 4, **float64))
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x, h = torch.randn(2, 3, **float64), torch.randn(2, 4, **float64)
    torch.testing.assert_close(compiled(x, h), cell(x, h))


def test_export():
    module = randomised(LeafLSTM(3, 4, batch_first=True))
    x = torch.randn(2, 5, 3)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_onnx(tmp_path, kind):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, x = randomised(LAYERS[kind][0](3, 4, bidirectional=True)), torch.randn(5, 2, 3)
    batch = {1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(module, (x,), dynamo=True, verbose=False, dynamic_shapes=(batch,)).save(tmp_path / "rnn.onnx")
    graph = onnx.load(tmp_path / "rnn.onnx")
    assert {node.domain for node in graph.graph.node} == {""} and not graph.functions
    session = runtime.InferenceSession(tmp_path / "rnn.onnx")
    for x in (x, torch.randn(5, 1, 3), torch.randn(5, 6, 3)):
        output, *_ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), module(x)[0].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_features(kind):
    """As in torch, only the state determines the next one."""
    module = CELLS[kind][0](0, 4, **float64)
    state = as_tuple(module(torch.randn(2, 0, **float64)))[0]
    (d,) = torch.autograd.grad(state.sum(), module.weight_hh, create_graph=True)
    assert d.requires_grad and not d.any()


@pytest.mark.parametrize("layout", ["batched", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_fallback(remove_kernels, kind, layout):
    module = randomised(LAYERS[kind][0](5, 7, num_layers=2, bidirectional=True, per_unit=True, **float64))
    x, hx = inputs(kind, {"num_layers": 2, "bidirectional": True}, 5, layout)
    expected = everything(module, x, hx)
    remove_kernels()
    with pytest.warns(leaf_cuda.FallbackWarning):
        assert_same(everything(module, x, hx), expected)
    with pytest.raises(ValueError, match="batch_sizes is .*never grow"):
        module(growing(torch.float64))
    module.leaf_l0.p1 = nn.Parameter(torch.zeros(2, 1, **float64))
    with pytest.raises(ValueError, match="p1 has shape"):
        module(x, hx)
    module.leaf_l0.p1 = nn.Parameter(module.leaf_l0.p2.to("meta"))
    with pytest.raises(ValueError, match=r"Leaf\w+: leaf_l0.p1 is on meta, but input is on cpu"):
        module(x, hx)


# ---- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_half(device, kind, half):
    module = LAYERS[kind][0](6, 8, per_unit=True).to(device)
    cell = CELLS[kind][0](6, 8).to(device)
    x = torch.randn(4, 3, 6, device=device)
    expected = module(x)[0]
    with torch.autocast(torch.device(device).type, half):
        output, hx = module(x)
        again, _ = module(x, hx)
        assert as_tuple(cell(x[0], cell(x[0])))[0].dtype == half
    assert output.dtype == again.dtype == as_tuple(hx)[0].dtype == half
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    low = copy.deepcopy(module).to(half)
    assert low.weight_ih_l0.dtype == half and low.leaf_l0.p3.dtype == torch.float32
    assert low(x.to(half))[0].dtype == half
    made = LAYERS[kind][0](6, 8, dtype=half)
    assert made.leaf_l0.p1.dtype == torch.float32
    assert LAYERS[kind][0](6, 8, dtype=torch.float64).leaf_l0.p1.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts(kind, tmp_path):
    """A complete one also loads, one with only some of LEAF's keys is refused, and copies are complete."""
    trained = randomised(LAYERS[kind][0](5, 7, num_layers=2, bidirectional=True, per_unit=True))
    x = torch.randn(4, 3, 5)
    model = nn.Sequential(LAYERS[kind][0](5, 7, num_layers=2, bidirectional=True, per_unit=True))
    state = {f"0.{k}": v for k, v in trained.state_dict().items()}
    model.load_state_dict(state)
    for copied in (model[0], copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
        assert torch.equal(copied(x)[0], trained(x)[0])
    del state["0.leaf_l1_reverse.p2"]
    with pytest.raises(RuntimeError, match="leaf_l1_reverse.p2"):
        model.load_state_dict(state)
    trained.reset_parameters()
    forms = {"LSTM": [[0, 0, 0, 0, 0], [1, 1, 2, 1, 2]], "GRU": [[0, 0, 0], [1, 1, 2]]}[kind]
    assert [p[:, 0].tolist() for p in (trained.leaf_l0.p1, trained.leaf_l0.p2)] == forms
    assert trained.leaf_l0.p4[2].unique().item() == -1


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_of_changed_layers(kind):
    """Parametrized and pruned layers, and a subclass with other children."""

    class Own(LAYERS[kind][0]):
        def __init__(self, *args):
            super().__init__(*args)
            self.drop = nn.Dropout(0.1)

    own = Own(5, 7)
    own.load_state_dict(LAYERS[kind][1](5, 7).state_dict(), strict=True)
    own.reset_parameters()
    x = torch.randn(4, 3, 5)
    for change in (
        lambda m: nn.utils.parametrizations.weight_norm(m, "weight_hh_l0"),
        lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.3),
    ):
        fixed, learned = (C(5, 7) for C in reversed(LAYERS[kind]))
        change(fixed)
        change(learned)
        learned.load_state_dict(fixed.state_dict(), strict=True)
        torch.testing.assert_close(learned(x)[0], fixed(x)[0])
        learned.load_state_dict(learned.state_dict())
        learned.reset_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_part_of_a_state_dict(kind):
    """What is missing in it keeps its trained values, LEAF's parameters too, and is listed."""
    module = LAYERS[kind][0](5, 7)
    for p in module.leaf_l0.parameters():
        nn.init.constant_(p, 0.5)
    state = {"weight_hh_l0": torch.zeros_like(module.weight_hh_l0)}
    missing = module.load_state_dict(state, strict=False).missing_keys
    assert set(missing) == module.state_dict().keys() - {"weight_hh_l0"}
    assert all((p == 0.5).all() for p in module.leaf_l0.parameters())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_from_the_meta_device(kind, assign):
    fixed = LAYERS[kind][1](5, 7, bidirectional=True)
    module = LAYERS[kind][0](5, 7, bidirectional=True, device="meta")
    assert module(torch.empty(4, 3, 5, device="meta"))[0].shape == (4, 3, 14)
    if not assign:
        module.to_empty(device="cpu")
    module.load_state_dict(fixed.state_dict(), strict=True, assign=assign)
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(module(x)[0], fixed(x)[0])


def test_training_and_optim(device):
    """A task that needs the state; optim and plot find LEAF's parameters."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"rnn": LeafLSTM(2, 12, per_unit=True), "head": nn.Linear(12, 1)}).to(device)
    activations, weights = leaf_cuda.optim.split_activation_parameters(model)
    assert {tuple(p.shape) for p in activations} == {(5, 12)} and len(activations) == 4
    groups = leaf_cuda.optim.leaf_param_groups(model, lr=1e-2, p24_lr=1e-3)
    assert [len(g["params"]) for g in groups] == [len(weights), 2, 2]
    optimizer, losses = torch.optim.Adam(groups), []
    before = [p.clone() for p in activations]
    for _ in range(150):
        x = torch.randint(0, 2, (8, 32, 2)).to(device).float()
        target = x[:, :, 0].cumsum(0) % 2
        loss = F.binary_cross_entropy_with_logits(model["head"](model["rnn"](x)[0])[..., 0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.98 * sum(losses[:10])
    assert all(not torch.equal(p, b) for p, b in zip(activations, before))


def test_plot():
    pytest.importorskip("matplotlib")
    figure = leaf_cuda.plot.plot_forms(LeafGRU(3, 4, per_unit=True))
    assert [a.get_title() for a in figure.axes] == [
        f"leaf_l0.{gate}: 4 forms" for gate in ("reset_gate", "update_gate", "candidate")
    ]


def test_example():
    for needed in ("sklearn", "tabulate", "tqdm"):
        pytest.importorskip(needed)
    program = Path(__file__).parents[1] / "examples" / "sequence_classification.py"
    options = ["--epochs", "4", "--seed", "0", "--kind", "GRU", "--lr", "0.01"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the operations are small: threads would wait for one another
    run = subprocess.run(
        [sys.executable, program, *options], env=environment, capture_output=True, text=True, check=True
    )
    rows = [line.split("|")[1:-1] for line in run.stdout.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["GRU", "LeafGRU"]
    assert all(float(row[1]) > 50 and float(row[3]) > 0 for row in rows)


# ---- bad input -------------------------------------------------------------------------------------------------------


def growing(dtype=torch.float32):
    return PackedSequence(torch.randn(5, 5, dtype=dtype), torch.tensor([2, 3]))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: m(torch.randn(4, 3, 6)), ValueError, r"input has shape \(4, 3, 6\); its last .* input_size, 5"),
        (lambda m: m(torch.randn(4)), ValueError, r"input has shape \(4,\); it takes \(steps, batch, features\)"),
        (lambda m: m([1, 2]), TypeError, "input is of type list"),
        (lambda m: m(torch.randn(4, 3, 5).double()), TypeError, "input has dtype torch.float64; it takes the weights'"),
        (lambda m: m(torch.randn(4, 3, 5, device="meta")), ValueError, "input is on meta"),
        (lambda m: m(torch.randn(0, 3, 5)), ValueError, "input has shape .*one step or more"),
        (lambda m: m(growing()), ValueError, "batch_sizes is .*never grow"),
        (
            lambda m: m(torch.randn(4, 3, 5), states(m, 1, 3, 8)),
            ValueError,
            r"hx.* has shape \(1, 3, 8\); .*\(1, 3, 7\)",
        ),
        (
            lambda m: m(torch.randn(4, 3, 5), states(m, 1, 2, 7)),
            ValueError,
            r"hx.* has shape \(1, 2, 7\); .*\(1, 3, 7\)",
        ),
        (lambda m: m(torch.randn(4, 5), states(m, 1, 3, 7)), ValueError, r"hx.* has shape \(1, 3, 7\); .*\(1, 7\)"),
        (
            lambda m: m(torch.randn(4, 3, 5), states(m, 1, 3, 7, torch.float64)),
            TypeError,
            "hx.* has dtype torch.float64",
        ),
        (lambda m: m(torch.randn(4, 3, 5), "h"), TypeError, "hx is of type str"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_layers(kind, call, error, message):
    with pytest.raises(error, match=f"(Leaf{kind}|leaf_{kind.lower()}): {message}"):
        call(LAYERS[kind][0](5, 7))


def states(module, *shape_and_dtype):
    *shape, dtype = shape_and_dtype if isinstance(shape_and_dtype[-1], torch.dtype) else (*shape_and_dtype, None)
    tensors = [torch.randn(shape, dtype=dtype) for _ in module._state_names]
    return tuple(tensors) if len(tensors) == 2 else tensors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_cells(kind):
    cell = CELLS[kind][0](5, 7)
    for arguments, error, message in [
        ((torch.randn(3, 4, 5),), ValueError, r"input has shape \(3, 4, 5\)"),
        ((torch.randn(3, 6),), ValueError, r"input has shape \(3, 6\)"),
        ((torch.randn(3, 5), states(cell, 3, 8)), ValueError, r"hx.* has shape \(3, 8\); it takes \(3, 7\)"),
        ((torch.randn(3, 5), states(cell, 7)), ValueError, r"hx.* has shape \(7,\); it takes \(3, 7\)"),
        ((torch.randn(3, 5).half(),), TypeError, "input has dtype torch.float16"),
        ((3,), TypeError, "input is of type int"),
    ]:
        with pytest.raises(error, match=f"Leaf{kind}Cell: {message}"):
            cell(*arguments)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="input has dtype torch.int64"):
        cell(torch.ones(3, 5, dtype=torch.long))
    with pytest.raises(TypeError, match="proj_size"):
        LeafLSTM(5, 7, proj_size=3)


def changed(name, tensor):
    """The operator's arguments, with one of them replaced."""
    x, (h, c), rest = draw("LSTM", 3, 4, 5)
    names = ["x", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "p1", "p2", "p3", "p4", "batch_sizes"]
    given = dict(zip(names, [x, h, c, *rest, None]))
    given[name] = tensor
    return (*given.values(), False)


@pytest.mark.parametrize(
    "name, tensor, error, message",
    [
        ("x", torch.zeros(3, 4, 4).long(), TypeError, "leaf_lstm: x has dtype torch.int64"),
        ("x", torch.zeros(3, 4, **float64), ValueError, "leaf_lstm: x has shape"),
        ("x", torch.zeros(3, 5, 4, **float64), ValueError, "leaf_lstm: h has shape"),
        ("h", torch.zeros(4, 5), TypeError, "leaf_lstm: h has dtype torch.float32"),
        ("h", torch.zeros(20, **float64), ValueError, r"leaf_lstm: h has shape \[20\]; it takes \(batch, hidden\)"),
        ("c", torch.zeros(4, 6, **float64), ValueError, "leaf_lstm: c has shape"),
        ("weight_ih", torch.zeros(20, 3, **float64), ValueError, "leaf_lstm: weight_ih has shape"),
        ("weight_hh", torch.zeros(5, 20, **float64), ValueError, "leaf_lstm: weight_hh has shape"),
        ("bias_ih", torch.zeros(5, **float64), ValueError, "leaf_lstm: bias_ih has shape"),
        ("bias_hh", torch.zeros(20, device="meta", **float64), ValueError, "leaf_lstm: bias_hh is on meta"),
        ("p2", torch.zeros(3, 5, **float64), ValueError, r"leaf_lstm: p2 has shape \[3, 5\]; it takes \(5, 1\) or"),
        ("p3", torch.zeros(5, 5), TypeError, "leaf_lstm: p3 has dtype torch.float32"),
        ("batch_sizes", torch.tensor([4]), ValueError, "leaf_lstm: x has shape"),
        ("weight_hh", torch.zeros(20, 5, **float64).to_sparse(), TypeError, "leaf_lstm: weight_hh has layout"),
    ],
)
def test_errors_of_the_operator(name, tensor, error, message):
    with pytest.raises(error, match=message):
        FORWARD(*changed(name, tensor))


def test_errors_of_batch_sizes():
    x, (h, c), rest = draw("LSTM", 3, 4, 5)
    rows = x.flatten(0, 1)
    for sizes, error in [
        ([4, 4, 5], ValueError),
        ([4, 4], ValueError),
        ([3, 3, 3, 3], ValueError),
        ([4, 4, 4, 0], ValueError),
        ([], ValueError),
        ([4.0, 4.0, 4.0], TypeError),
    ]:
        with pytest.raises(error, match="leaf_lstm: batch_sizes is"):
            FORWARD(rows, h, c, *rest, torch.tensor(sizes, dtype=torch.long if not sizes else None), False)


def test_the_backward_operator_has_no_gradient():
    x, (h, c), rest = draw("LSTM", 3, 4, 5)
    output, _, _, cells, pre = FORWARD(x, h, c, *rest, None, False)
    with pytest.raises(NotImplementedError, match="create_graph"):
        BACKWARD(output, None, None, output, cells, pre, x.requires_grad_(), h, c, *rest, None, False, [True] * 11)


def test_pack_padded(device):
    """Packed as users do: the padding does not affect the result."""
    module = randomised(LeafGRU(3, 4, bidirectional=True, batch_first=True).to(device))
    x, lengths = torch.randn(3, 6, 3, device=device), [6, 2, 4]
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    output, h = module(packed)
    output, _ = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
    for k, n in enumerate(lengths):
        alone, h_alone = module(x[k, :n])
        torch.testing.assert_close(output[k, :n], alone)
        torch.testing.assert_close(h[:, k], h_alone)
