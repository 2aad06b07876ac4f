"""leaf_glu, LeafGLU and LeafMLP: y = leaf(a)·b, of two tensors or of one with both side by side."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPE_PAIRS, LAYOUTS, draw, dtype_id, plain
from test_accuracy import Pool
from test_func import Calls
from test_memory import peak, size
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import leaf_cuda
from leaf_cuda import leaf_glu
from leaf_cuda.nn import LeafGLU, LeafMLP

FORWARD, BACKWARD = torch.ops.leaf_cuda.leaf_glu_forward, torch.ops.leaf_cuda.leaf_glu_backward

#: name → (shape of a and b, shapes of p1, ..., p4)
CASES = {
    "layer": ((7, 24), [(1,)] * 4),
    "scalar": ((24,), [()] * 4),
    "features": ((7, 24), [(24,)] * 4),
    "odd_features": ((7, 19), [(19,)] * 4),
    "one_feature": ((7, 1), [(1,)] * 4),
    "tokens": ((3, 5, 16), [(16,)] * 4),
    "rows": ((3, 5, 16), [(5, 1)] * 4),
    "rows_and_features": ((3, 5, 16), [(5, 16)] * 4),
    "batch": ((3, 5, 16), [(3, 1, 1)] * 4),
    "mixed": ((3, 5, 16), [(1,), (5, 1), (16,), (3, 1, 1)]),
    "no_p2_and_p4": ((7, 24), [(24,), None, (24,), None]),
    "channels": ((2, 3, 4, 5), [(3, 1, 1)] * 4),
    "long_rows": ((5, 4500), [(4500,)] * 4),
    "long_rows_of_one_set": ((5, 4500), [(1,)] * 4),
    "many_rows": ((600, 40), [(40,)] * 4),
}


def formula(a, b, *parameters):
    return plain(a, *parameters) * b


def by_chunks(x, *parameters):
    return formula(*x.chunk(2, -1), *parameters)


def draw_glu(shape, shapes, **options):
    """a, b, the parameters, g."""
    a, parameters, g = draw(shape, shapes, **options)
    b, _, _ = draw(shape, shapes, **options)
    return a, b, parameters, g


def evaluate(f, tensors, parameters, g):
    """y, and the gradients of the tensors and parameters that are not None."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in (*tensors, *parameters)]
    y = f(*leaves)
    given = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given, g)]


def assert_same(results, expected):
    assert len(results) == len(expected)
    for r, e in zip(results, expected):
        assert r.shape == e.shape
        torch.testing.assert_close(r, e, rtol=1e-11, atol=1e-11)


def packed_function(x, *parameters):
    return leaf_glu(x, None, *parameters)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_two_tensors(device, case):
    a, b, parameters, g = draw_glu(*CASES[case], device=device)
    assert_same(evaluate(leaf_glu, (a, b), parameters, g), evaluate(formula, (a, b), parameters, g))


@pytest.mark.parametrize("case", CASES)
def test_packed(device, case):
    a, b, parameters, g = draw_glu(*CASES[case], device=device)
    x = torch.cat([a, b], -1)
    assert_same(evaluate(packed_function, (x,), parameters, g), evaluate(by_chunks, (x,), parameters, g))


@pytest.mark.parametrize("of_b", LAYOUTS)
@pytest.mark.parametrize("of_a", LAYOUTS)
@pytest.mark.parametrize("case", ["channels", "mixed_4d"])
def test_layouts(device, case, of_a, of_b):
    shapes = CASES["channels"][1] if case == "channels" else [(1,), (3, 1, 1), (5,), (4, 5)]
    a, b, parameters, g = draw_glu((2, 3, 4, 5), shapes, device=device)
    a, b = LAYOUTS[of_a](a), LAYOUTS[of_b](b)
    assert_same(evaluate(leaf_glu, (a, b), parameters, g), evaluate(formula, (a, b), parameters, g))


@pytest.mark.parametrize("of_g", LAYOUTS)
@pytest.mark.parametrize("of_x", [k for k in LAYOUTS])
def test_layouts_of_packed(device, of_x, of_g):
    a, b, parameters, g = draw_glu((2, 3, 4, 6), [(1,), (3, 1, 1), (6,), (4, 6)], device=device)
    x, g = LAYOUTS[of_x](torch.cat([a, b], -1)), LAYOUTS[of_g](g)
    assert_same(evaluate(packed_function, (x,), parameters, g), evaluate(by_chunks, (x,), parameters, g))


@pytest.mark.parametrize("hidden", [1, 3, 8, 16, 17, 24, 33, 64, 127, 128, 200, 2049, 4097])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_widths_of_packed(device, hidden, dtype):
    """Halves that begin at any alignment, per feature and per layer; also as a slice of a larger matrix."""
    for shapes in [(hidden,)] * 4, [(1,)] * 4:
        a, b, parameters, g = draw_glu((9, hidden), shapes, dtype=torch.float64, device=device)
        wide = torch.cat([a, b, a, b], -1).to(dtype)
        parameters, g = [p.to(dtype) for p in parameters], g.to(dtype)
        for x in (wide[:, : 2 * hidden], wide[1:, hidden : 3 * hidden]):
            results = evaluate(packed_function, (x,), parameters, g[: len(x)])
            double = [t.double() for t in parameters]
            expected = evaluate(by_chunks, (x.double(),), double, g[: len(x)].double())
            for r, e in zip(results, expected):
                torch.testing.assert_close(r, e.to(dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, parameter_dtype", DTYPE_PAIRS[1:], ids=dtype_id)
@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("case", ["layer", "features", "odd_features", "rows"])
def test_promise_3(device, case, packed, dtype, parameter_dtype):
    pools = {}
    for _ in range(32):
        a, b, parameters, g = draw_glu(*CASES[case], dtype=dtype, parameter_dtype=parameter_dtype, device=device)
        tensors = (torch.cat([a, b], -1),) if packed else (a, b)
        ours = evaluate(packed_function if packed else leaf_glu, tensors, parameters, g)
        of_torch = by_chunks if packed else formula
        theirs = evaluate(of_torch, tensors, [p.to(dtype) for p in parameters], g)
        true = evaluate(of_torch, [t.double() for t in tensors], [p.double() for p in parameters], g.double())
        for k, (x, y, z) in enumerate(zip(ours, theirs, true)):
            pools.setdefault(k, Pool()).add(x, y, z)
    for k, pool in pools.items():
        pool.assert_promise_3(f"result {k}")


def test_begins_as_swiglu(device):
    a, b = torch.randn(2, 50, 64, device=device)
    torch.testing.assert_close(LeafGLU().to(device)(a, b), F.silu(a) * b)
    torch.testing.assert_close(LeafGLU(init_as="ReLU").to(device)(a, b), F.relu(a) * b, rtol=0, atol=1e-5)
    x = torch.cat([b, a], -1)
    torch.testing.assert_close(LeafGLU(init_as="Sigmoid").to(device)(torch.cat([a, b], -1)), F.glu(x))


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("case", ["layer", "features", "rows", "mixed", "channels"])
def test_threads_and_runs(set_threads, case, packed):
    """Bitwise the same, whatever the number of threads."""
    shape, shapes = {
        "layer": ((700, 300), [(1,)] * 4),
        "features": ((700, 300), [(300,)] * 4),
        "rows": ((70, 10, 300), [(10, 1)] * 4),
        "mixed": ((70, 10, 300), [(1,), (10, 1), (300,), (10, 300)]),
        "channels": ((8, 12, 60, 61), [(12, 1, 1)] * 4),
    }[case]
    a, b, parameters, g = draw_glu(shape, shapes, dtype=torch.float32)
    tensors = (torch.cat([a, b], -1),) if packed else (a, b)
    function = packed_function if packed else leaf_glu
    set_threads(1)
    expected = evaluate(function, tensors, parameters, g)
    for threads in (1, 2, 3):
        set_threads(threads)
        assert all(torch.equal(r, e) for r, e in zip(evaluate(function, tensors, parameters, g), expected))


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
def test_no_elements(device, packed):
    a, b, parameters, g = draw_glu((0, 6), [(6,)] * 4, device=device)
    tensors = (torch.cat([a, b], -1),) if packed else (a, b)
    y, *gradients = evaluate(packed_function if packed else leaf_glu, tensors, parameters, g)
    assert y.shape == (0, 6) and all(d.shape == t.shape for d, t in zip(gradients, (*tensors, *parameters)))
    assert all(torch.equal(d, torch.zeros_like(d)) for d in gradients)


# ---- memory and passes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("case", ["layer", "features"])
def test_memory(device, case, packed):
    """Forward allocates y, backward the gradients of a and b, and partial sums: a packed tensor's halves are not
    copied."""
    shape = (2048, 1024)
    a, b, parameters, g = draw_glu(
        shape, [(1,) if case == "layer" else (1024,)] * 4, dtype=torch.float32, device=device
    )
    tensors = (torch.cat([a, b], -1),) if packed else (a, b)
    function = packed_function if packed else leaf_glu
    leaves = [t.requires_grad_() for t in (*tensors, *parameters)]
    assert peak(device, lambda: function(*leaves)) <= size(a) + 4096
    y = function(*leaves)
    of_parameters = sum(size(p) for p in parameters)
    most = peak(device, lambda: torch.autograd.grad(y, leaves, g))
    assert 2 * size(a) <= most <= 2 * size(a) + of_parameters + size(a) // 8 + 2**16


def test_one_pass_each():
    a, b, parameters, _ = draw_glu(*CASES["features"])
    leaves = [t.requires_grad_() for t in (a, b, *parameters)]
    with Calls() as calls:
        leaf_glu(*leaves).sum().backward()
    names = [n for n in calls.names if n not in ("sum", "ones_like", "expand", "detach")]
    assert names == ["leaf_glu_forward", "leaf_glu_backward"]


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
def test_masks(device, packed):
    a, b, parameters, g = draw_glu(*CASES["features"], device=device)
    given = (torch.cat([a, b], -1), None) if packed else (a, b)
    everything = BACKWARD(g, *given, *parameters, [True] * 6)
    assert (everything[1] is None) == packed
    for k in range(2**6):
        mask = [bool(k >> j & 1) for j in range(6)]
        for some, whole, wanted in zip(BACKWARD(g, *given, *parameters, mask), everything, mask):
            assert (some is None) == (whole is None or not wanted)
            assert some is None or torch.equal(some, whole)


# ---- autograd, torch.func, compilers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("case", ["layer", "features", "rows", "mixed", "no_p2_and_p4"])
def test_gradcheck(device, case, packed):
    shape, shapes = CASES[case]
    shape = (*(min(n, 3) for n in shape[:-1]), 4)
    shapes = [None if s is None else tuple(4 if n > 5 else min(n, 3) for n in s) for s in shapes]
    a, b, parameters, _ = draw_glu(shape, shapes, device=device)
    tensors = (torch.cat([a, b], -1),) if packed else (a, b)
    leaves = [t if t is None else t.requires_grad_() for t in (*tensors, *parameters)]
    function = packed_function if packed else leaf_glu
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves)


TRANSFORMS = {
    "grad": lambda f, *a: grad(lambda *b: f(*b).sin().sum(), tuple(range(6)))(*a),
    "jvp": lambda f, *a: jvp(f, a, tuple(t.cos() for t in a)),
    "jacrev": lambda f, *a: jacrev(f, (0, 2))(*a),
    "hessian": lambda f, *a: hessian(lambda *b: f(*b).sin().sum(), (0, 4))(*a),
    "vmap": lambda f, *a: vmap(f, (0, 0, None, None, None, None))(*a),
    "vmap_of_parameters": lambda f, *a: vmap(f, (None, None, 0, None, None, 0))(
        *a[:2], *(t.expand(3, 4) for t in a[2:])
    ),
    "vmap_of_grad": lambda f, *a: vmap(grad(lambda *b: f(*b).sin().sum(), (0, 2)), (0, 0, *[None] * 4))(*a),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(device, transform):
    a, b, parameters, _ = draw_glu((3, 4), [(4,)] * 4, device=device)
    if transform == "vmap_of_parameters":
        parameters = [p[None] for p in parameters]

    def leaves(t):
        return torch.utils._pytree.tree_leaves(TRANSFORMS[transform](t, a, b, *parameters))

    assert_same(leaves(leaf_glu), leaves(formula))


def test_backward_of_a_batch_of_gradients():
    """With is_grads_batched=True, it is one call of the kernel."""
    a, b, parameters, _ = draw_glu((3, 4), [(4,)] * 4)
    leaves = [t.requires_grad_() for t in (a, b, *parameters)]
    g = torch.randn(5, 3, 4, dtype=torch.float64)
    results, expected = (torch.autograd.grad(f(*leaves), leaves, g, is_grads_batched=True) for f in (leaf_glu, formula))
    assert_same(results, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("dtype, parameter_dtype", [DTYPE_PAIRS[1], (torch.bfloat16, torch.float32)], ids=dtype_id)
@pytest.mark.parametrize("needed", [False, True])
def test_opcheck(needed, dtype, parameter_dtype, packed):
    a, b, parameters, g = draw_glu(*CASES["mixed"], dtype=dtype, parameter_dtype=parameter_dtype)
    given = (torch.cat([a, b], -1), None) if packed else (a, b)
    leaves = [t if t is None else t.requires_grad_(needed) for t in (*given, *parameters)]
    torch.library.opcheck(FORWARD, leaves)
    torch.library.opcheck(BACKWARD, (g.requires_grad_(needed), *leaves, [True] * 6))


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compile(backend, packed):
    torch._dynamo.reset()
    a, b, parameters, g = draw_glu(*CASES["tokens"])
    tensors = (torch.cat([a, b], -1),) if packed else (a, b)
    function = packed_function if packed else leaf_glu
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for n in (3, 2, 5):
        some = [torch.cat([t, t])[:n] for t in tensors]
        results = evaluate(compiled, some, parameters, torch.cat([g, g])[:n])
        assert_same(results, evaluate(function, some, parameters, torch.cat([g, g])[:n]))


@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x, mlp = torch.randn(3, 8), LeafMLP(8, 12)
    torch.onnx.export(mlp, (x,), dynamo=True, verbose=False).save(tmp_path / "mlp.onnx")
    graph = onnx.load(tmp_path / "mlp.onnx")
    assert {node.domain for node in graph.graph.node} == {""} and not graph.functions
    session = runtime.InferenceSession(tmp_path / "mlp.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), mlp(x).detach(), rtol=1e-5, atol=1e-5)


def test_fallback(remove_kernels):
    """Without a kernel, the formula runs."""
    a, b, parameters, g = draw_glu(*CASES["mixed"], dtype=torch.bfloat16, parameter_dtype=torch.float32)
    expected = leaf_glu(a, b, *parameters)
    remove_kernels()
    with pytest.warns(leaf_cuda.FallbackWarning):
        y = leaf_glu(a, b, *parameters)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(leaf_glu(torch.cat([a, b], -1), None, *parameters), expected)


# ---- modules ---------------------------------------------------------------------------------------------------------


class PlainMLP(nn.Module):
    """LLaMA's."""

    def __init__(self, hidden, intermediate):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("size", [(1,), (24,)])
def test_mlp_takes_llamas_weights(device, size):
    fixed = PlainMLP(8, 24).to(device, torch.float64)
    mlp = LeafMLP(8, 24, size=size, device=device, dtype=torch.float64)
    mlp.load_state_dict(fixed.state_dict(), strict=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64, device=device, requires_grad=True)
    torch.testing.assert_close(mlp(x), fixed(x))
    (expected,) = torch.autograd.grad(fixed(x).sin().sum(), x)
    mlp(x).sin().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    for name, p in fixed.named_parameters():
        (d,) = torch.autograd.grad(fixed(x).sin().sum(), p)
        torch.testing.assert_close(dict(mlp.named_parameters())[name].grad, d)
    assert all(p.grad.abs().max() > 0 for p in mlp.act_fn.parameters())


def test_part_of_a_state_dict():
    """What is missing in it keeps its trained values, LEAF's parameters too, and is listed."""
    mlp = LeafMLP(8, 24)
    torch.nn.init.constant_(mlp.act_fn.p1, 0.5)
    missing = mlp.load_state_dict({"gate_proj.weight": torch.zeros(24, 8)}, strict=False).missing_keys
    assert set(missing) == mlp.state_dict().keys() - {"gate_proj.weight"} and mlp.act_fn.p1 == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("assign", [False, True])
def test_mlp_from_the_meta_device(assign, dtype):
    """LLaMA's weights loaded into a module without values: LEAF's parameters then have their initial form, in the
    weights' arithmetic dtype."""
    state = PlainMLP(8, 24).to(dtype).state_dict()
    mlp = LeafMLP(8, 24, size=(24,), device="meta", dtype=dtype)
    if not assign:
        mlp.to_empty(device="cpu")
    mlp.load_state_dict(state, strict=True, assign=assign)
    assert [p.unique().tolist() for p in mlp.act_fn.parameters()] == [[1], [0], [1], [0]]
    assert {p.dtype for p in mlp.act_fn.parameters()} == {torch.promote_types(dtype, torch.float32)}
    assert mlp(torch.randn(2, 8).to(dtype)).dtype == dtype


def test_mlp_beside_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert LeafMLP(4, 8, dtype=dtype)(torch.randn(2, 4, dtype=dtype)).dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_mlp_state_dict():
    """A complete one also loads; one that has only some of LEAF's keys is refused."""
    trained = LeafMLP(8, 24)
    with torch.no_grad():
        trained.act_fn.p3.fill_(2)
    model = nn.Sequential(LeafMLP(8, 24))
    state = nn.Sequential(trained).state_dict()
    model.load_state_dict(state)
    assert model[0].act_fn.p3.item() == 2
    x = torch.randn(3, 8)
    assert torch.equal(model(x), trained(x))
    del state["0.act_fn.p4"]
    with pytest.raises(RuntimeError, match="act_fn.p4"):
        model.load_state_dict(state)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_and_half(device, half):
    mlp = LeafMLP(8, 24, init_as="ReLU", device=device)
    x = torch.randn(3, 8, device=device)
    with torch.autocast(torch.device(device).type, half):
        y = mlp(x)
    assert y.dtype == half
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in mlp.parameters())
    low = copy.deepcopy(mlp).to(half)
    assert low.gate_proj.weight.dtype == half and low.act_fn.p3.dtype == torch.float32
    assert low(x.to(half)).dtype == half


def test_functional_call_and_training(device):
    mlp = LeafMLP(8, 24, size=(24,)).to(device)
    x, target = torch.randn(32, 8).to(device), torch.randn(32, 8).to(device)
    y = functional_call(mlp, dict(mlp.named_parameters()), (x,))
    assert torch.equal(y, mlp(x))
    optimizer = torch.optim.Adam(mlp.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(mlp(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ---- bad input -------------------------------------------------------------------------------------------------------


ONE = torch.ones(4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.ones(2, 4), torch.ones(2, 3), ONE, ONE, ONE, ONE), ValueError, "leaf_glu: b has shape"),
        ((torch.ones(2, 4), torch.ones(4), ONE, ONE, ONE, ONE), ValueError, "leaf_glu: b has shape"),
        ((torch.ones(2, 4), torch.ones(2, 4).half(), ONE, ONE, ONE, ONE), TypeError, "leaf_glu: b has dtype"),
        ((torch.ones(2, 5), None, ONE, ONE, ONE, ONE), ValueError, "leaf_glu: a has shape .*even"),
        ((torch.ones(()), None, ONE, ONE, ONE, ONE), ValueError, "leaf_glu: a has shape .*even"),
        ((torch.ones(2, 4), None, ONE, ONE, ONE, ONE), ValueError, "leaf_glu: p1 of shape .* broadcast to a of"),
        ((torch.ones(2, 4), torch.ones(2, 4), ONE, ONE, ONE.double(), ONE), TypeError, "leaf_glu: p3 has dtype"),
        ((torch.ones(2, 4).long(), torch.ones(2, 4), ONE, ONE, ONE, ONE), TypeError, "leaf_glu: a has dtype"),
        ((torch.ones(2, 4), 2.0, ONE, ONE, ONE, ONE), TypeError, "leaf_glu: b is of type float"),
        ((3, torch.ones(2, 4), ONE, ONE, ONE, ONE), TypeError, "leaf_glu: a is of type int"),
        ((torch.ones(2, 4), torch.ones(2, 4), None, ONE, ONE, ONE), TypeError, "leaf_glu: p1 is of type NoneType"),
        ((torch.ones(2, 4), torch.ones(2, 4, device="meta"), ONE, ONE, ONE, ONE), ValueError, "b is on meta"),
        ((torch.ones(2, 4).to_sparse(), torch.ones(2, 4), ONE, ONE, ONE, ONE), TypeError, "leaf_glu: a has layout"),
        ((torch.ones(2, 4), torch.ones(2, 4).to_sparse(), ONE, ONE, ONE, ONE), TypeError, "leaf_glu: b has layout"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        leaf_glu(*arguments)


def test_vmap_of_a_packed_scalar():
    """The batch dimension is not split into a and b."""
    for shape, f in (((4,), vmap), ((3, 4), lambda f: vmap(vmap(f)))):
        with pytest.raises(ValueError, match="leaf_glu: a has shape .*even"):
            f(lambda a: leaf_glu(a, None, 1, 0, 1, 0))(torch.randn(shape))


def test_strides_of_a_packed_line():
    """They are what the meta kernel says."""
    x, one = torch.randn(1, 8), torch.ones(1)
    assert FORWARD(x, None, one, one, one, one).stride() == (4, 1)


def test_numbers_stand_for_parameters(device):
    a, b, _, g = draw_glu((3, 4), [(4,)] * 4, device=device)
    expected = evaluate(lambda a, b: formula(a, b, 1.5, 0.5, 2.0, -1.0), (a, b), (), g)
    assert_same(evaluate(lambda a, b: leaf_glu(a, b, 1.5, 0.5, 2, -1), (a, b), (), g), expected)
