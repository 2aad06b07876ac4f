"""The registered operators, and what stands around them: autograd, torch.compile, the fallback."""

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.utils.flop_counter
from cases import DTYPE_PAIRS, GRANULARITIES, LAYOUTS, assert_true, draw, dtype_id, evaluate, plain
from torch.fx.experimental.proxy_tensor import make_fx

import leaf_cuda
from leaf_cuda import _ops

FORWARD, BACKWARD = torch.ops.leaf_cuda.leaf_forward, torch.ops.leaf_cuda.leaf_backward
DOUBLE_BACKWARD = torch.ops.leaf_cuda.leaf_double_backward


def required(tensors, needed):
    return [t if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needed)]


OPCHECK_PAIRS = [DTYPE_PAIRS[0], DTYPE_PAIRS[1], (torch.bfloat16, torch.float32)]

# ---- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "mixed", "no_p2", "ahaf"])
@pytest.mark.parametrize("dtype, parameter_dtype", OPCHECK_PAIRS, ids=dtype_id)
def test_opcheck(dtype, parameter_dtype, granularity, needed):
    shape, shapes = GRANULARITIES[granularity](2, 3, 4, 5)
    u, parameters, g = draw(shape, shapes, dtype=dtype, parameter_dtype=parameter_dtype)
    mask = [True, *(p is not None for p in parameters)]
    torch.library.opcheck(FORWARD, required([u, *parameters], [needed] * 5))
    torch.library.opcheck(BACKWARD, (*required([g, u, *parameters], [needed] * 6), mask))
    v, directions, _ = draw(shape, shapes, dtype=dtype, parameter_dtype=parameter_dtype)
    arguments = required([v, *directions, g, u, *parameters], [needed] * 11)
    torch.library.opcheck(DOUBLE_BACKWARD, (*arguments, [True] * 6))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_layouts(layout):
    u, parameters, g = draw(*GRANULARITIES["no_run"](2, 3, 4, 5))
    u = LAYOUTS[layout](u)
    torch.library.opcheck(FORWARD, (u, *parameters))
    torch.library.opcheck(BACKWARD, (g, u, *parameters, [True] * 5))
    torch.library.opcheck(DOUBLE_BACKWARD, (g, *parameters, g, u, *parameters, [True] * 6))


@pytest.mark.parametrize(
    "mask", list(itertools.product([False, True], repeat=5)), ids=lambda m: "".join("01"[x] for x in m)
)
def test_opcheck_of_masks(mask):
    u, parameters, g = draw(*GRANULARITIES["channel"](2, 3, 4, 5), dtype=torch.float32)
    torch.library.opcheck(BACKWARD, (g, u, *parameters, list(mask)), test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"v": torch.ones(3)}, ValueError, "leaf_double_backward: v has shape"),
        ({"v1": torch.ones(4)}, ValueError, "leaf_double_backward: v1 has shape"),
        ({"v2": torch.ones(3)}, ValueError, "leaf_double_backward: v2 is a tensor, but p2 is None"),
        ({"v3": torch.ones(3).half()}, TypeError, "leaf_double_backward: v3 has dtype"),
        ({"grad": torch.ones(3)}, ValueError, "leaf_double_backward: grad has shape"),
        ({"u": torch.ones(2, 3).to_sparse()}, TypeError, "u has layout"),
        ({"grad": torch.ones(2, 3).to_sparse()}, TypeError, "leaf_double_backward: grad has layout"),
        ({"v": torch.ones(2, 3).to_sparse()}, TypeError, "leaf_double_backward: v has layout"),
    ],
)
def test_double_backward_checks_its_arguments(change, error, message):
    given = dict.fromkeys(["v", "v1", "v2", "v3", "v4"])
    given |= {"grad": torch.ones(2, 3), "u": torch.ones(2, 3)}
    given |= {"p1": torch.ones(3), "p2": None, "p3": torch.ones(3), "p4": torch.ones(3), "output_mask": [True] * 6}
    torch.ops.leaf_cuda.leaf_double_backward(**given)
    with pytest.raises(error, match=message):
        torch.ops.leaf_cuda.leaf_double_backward(**given | change)


# ---- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("granularity", ["layer", "channel", "element", "features", "no_run", "mixed"])
def test_masks_of_the_operator(device, granularity, layout):
    """Only the results asked for are returned, bitwise as when all are; also where du's memory holds a copy of u."""
    shape, shapes = GRANULARITIES[granularity](3, 4, 5, 6)
    if len(shape) == 4:
        u, parameters, g = draw(shape, shapes, dtype=torch.float32, device=device)
        u = LAYOUTS[layout](u)
    else:
        u, parameters, g = draw(shape, shapes, dtype=torch.float32, device=device)
    everything = BACKWARD(g, u, *parameters, [True] * 5)
    for mask in itertools.product([False, True], repeat=5):
        some = BACKWARD(g, u, *parameters, list(mask))
        for k, wanted in enumerate(mask):
            assert (some[k] is not None) == wanted
            assert not wanted or torch.equal(some[k], everything[k])


@pytest.mark.parametrize("granularity", ["channel", "mixed", "no_p2", "no_p4", "ahaf"])
def test_subsets_that_require_gradients(device, route, granularity):
    u, parameters, g = draw(*GRANULARITIES[granularity](3, 4, 5, 6), device=device)
    all_gradients = evaluate(plain, u, parameters, g)[1:]
    for needed in itertools.product([False, True], repeat=5):
        arguments = required([u, *parameters], needed)
        y = route(*arguments)
        leaves = [t is not None and t.requires_grad for t in arguments]
        assert y.requires_grad == any(leaves)
        if not any(leaves):
            continue
        y.backward(g)
        for t, wanted, expected in zip(arguments, leaves, all_gradients):
            assert t is None or (t.grad is not None) == wanted
            if wanted:
                torch.testing.assert_close(t.grad, expected)


@pytest.mark.parametrize("granularity", ["channel", "mixed", "no_p2", "no_p4", "ahaf"])
def test_backward_asks_for_no_more_than_is_needed(route, granularity):
    """The mask that the kernel gets has only du and dp3."""
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            if function is BACKWARD.default:
                seen.append(list(arguments[-1]))
            return function(*arguments, **(kwargs or {}))

    u, parameters, g = draw(*GRANULARITIES[granularity](3, 4, 5, 6))
    arguments = required([u, *parameters], [True, False, False, True, False])
    with Record():
        route(*arguments).backward(g)
    assert seen == [[True, False, False, True, False]]


def test_routes_agree_bitwise(device):
    u, parameters, g = draw(*GRANULARITIES["mixed"](3, 4, 5, 6), dtype=torch.float32, device=device)
    results = [evaluate(f, u, parameters, g) for f in (leaf_cuda.leaf, leaf_cuda.LeafFunction.apply, FORWARD)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    y = FORWARD(u, *parameters)
    assert torch.equal(y, results[0][0]) and not y.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], BACKWARD(g, u, *parameters, [True] * 5)))


class Subclass(torch.Tensor):
    pass


def under(context):
    def call(f, u):
        with context():
            f(u)

    return call


#: f, u → calls f(u) in such a way that the short way to the operator may be taken.
PLAIN = {
    "tensor": lambda f, u: f(u),
    "parameter": lambda f, u: f(torch.nn.Parameter(u)),
    "no_grad": under(torch.no_grad),
    "inference_mode": under(torch.inference_mode),
    "autocast": under(lambda: torch.autocast("cpu", torch.bfloat16)),
    "dual_level": under(torch.autograd.forward_ad.dual_level),
    "meta": lambda f, u: f(u.to("meta")),
}
#: The same, but so that the call must go through torch.ops.
OTHERS = {
    "subclass": lambda f, u: f(u.as_subclass(Subclass)),
    "function mode": under(torch.overrides.BaseTorchFunctionMode),
    "device": under(lambda: torch.device("cpu")),
    "dispatch mode": under(torch.utils.flop_counter.FlopCounterMode),
    "fake tensor": lambda f, u: f(torch._subclasses.FakeTensorMode().from_tensor(u)),
    "vmap": lambda f, u: torch.vmap(f)(u),
    "grad": lambda f, u: torch.func.grad(lambda u: f(u).sum())(u),
    "functionalize": lambda f, u: torch.func.functionalize(f)(u),
    "jit.trace": lambda f, u: torch.jit.trace(f, (u,), check_trace=False),
    "make_fx": lambda f, u: make_fx(f)(u),
    "symbolic_trace": lambda f, u: torch.fx.symbolic_trace(f),
    "numpy": lambda f, u: pytest.raises(TypeError, f, u.numpy()),
}


@pytest.mark.parametrize("way", [*PLAIN, *OTHERS])
def test_short_way_to_the_operator(way):
    """It bypasses torch.ops, and is taken only if no subclass, mode, transform or tracer would have seen the call."""
    taken = []

    def f(u):
        parameter = u.new_ones(1) if isinstance(u, torch.Tensor) else torch.ones(1)
        taken.append(_ops.plain_leaf_forward(u, parameter, None, parameter, None) is not NotImplemented)
        taken.append(_ops.plain_leaf_glu_forward(u, u, parameter, None, parameter, None) is not NotImplemented)
        return leaf_cuda.leaf(u, parameter, None, parameter, None)

    {**PLAIN, **OTHERS}[way](f, torch.randn(3, 4))
    assert taken == [way in PLAIN] * 2


def test_ahaf_is_leaf_without_p2_and_p4(device):
    u, (p1, _, p3, _), g = draw(*GRANULARITIES["channel"](3, 4, 5, 6), dtype=torch.float32, device=device)
    assert torch.equal(leaf_cuda.ahaf(u, p1, p3), leaf_cuda.leaf(u, p1, None, p3, None))
    zero = torch.zeros((), device=device)
    assert torch.equal(leaf_cuda.ahaf(u, p1, p3), leaf_cuda.leaf(u, p1, zero, p3, zero))


@pytest.mark.parametrize(
    "numbers", [(2, None, 1.5, 0), (1, 0.5, 2, -1), (torch.ones(3, 1, 1), 0.5, 2, None), (1, -0.0, 1, 0.0)], ids=str
)
def test_numbers_are_constants(device, numbers):
    u, _, g = draw((2, 3, 4, 5), [(1,)] * 4, dtype=torch.float32, device=device)
    numbers = [p.to(device) if isinstance(p, torch.Tensor) else p for p in numbers]
    tensors = [torch.full((1,), float(p), device=device) if isinstance(p, (int, float)) else p for p in numbers]
    u.requires_grad_()
    y = leaf_cuda.leaf(u, *numbers)
    (du,) = torch.autograd.grad(y, u, g)
    expected = evaluate(leaf_cuda.leaf, u, tensors, g)
    assert torch.equal(y, expected[0]) and torch.equal(du, expected[1])


@pytest.mark.parametrize("granularity", ["layer", "channel", "mixed", "no_p2", "no_p4", "ahaf"])
def test_saves_only_u_and_the_parameters(device, route, granularity):
    u, parameters, g = draw(
        *GRANULARITIES[granularity](3, 4, 5, 6), dtype=torch.bfloat16, parameter_dtype=torch.float32, device=device
    )
    arguments = required([u, *parameters], [True] * 5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = route(*arguments)
    inputs = [t for t in arguments if t is not None]
    assert len(saved) == len(inputs)
    assert {(t.data_ptr(), t.numel(), t.dtype) for t in saved} == {(t.data_ptr(), t.numel(), t.dtype) for t in inputs}
    y.backward(g)
    assert all(t.grad is not None for t in inputs)


def test_changes_in_place(device, route):
    """y is not saved, so it may be changed in place; u is saved, so backward raises if it was changed."""
    u, parameters, g = draw((3, 4), [(4,)] * 4, device=device)
    expected = evaluate(route, u, parameters, g)
    arguments = required([u, *parameters], [True] * 5)
    y = route(*arguments)
    y.detach().mul_(2)
    y.backward(g)
    assert torch.equal(arguments[0].grad, expected[1])
    for changed in (u, parameters[2]):
        arguments = [u.clone().requires_grad_(), *parameters]
        changing = [t.clone() for t in [u, *parameters]]
        k = 0 if changed is u else 3
        changing = [t.requires_grad_() for t in changing]
        y = route(*changing)
        with torch.no_grad():
            changing[k].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(g)


def test_graph_kept_and_gradients_accumulated(device, route):
    u, parameters, g = draw((3, 4), [(4,)] * 4, device=device)
    once = evaluate(route, u, parameters, g)[1:]
    arguments = required([u, *parameters], [True] * 5)
    y = route(*arguments)
    y.backward(g, retain_graph=True)
    y.backward(g)
    assert all(torch.equal(t.grad, 2 * d) for t, d in zip(arguments, once))


def test_without_gradients(device):
    u, parameters, _ = draw((3, 4), [(4,)] * 4, device=device)
    expected = leaf_cuda.leaf(u, *parameters)
    arguments = required([u, *parameters], [True] * 5)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = leaf_cuda.leaf(*arguments)
            assert not y.requires_grad and torch.equal(y, expected)


# ---- torch.compile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "granularity, backend", [("channel", "inductor"), ("channel", "aot_eager"), ("no_p2", "aot_eager")]
)
def test_compile(granularity, backend):
    """No graph break, and the same numbers: in a model, with gradients, and for a second shape."""
    torch._dynamo.reset()
    _, parameters, _ = draw(*GRANULARITIES[granularity](2, 3, 4, 5), dtype=torch.float32)

    def function(u, *p):
        return leaf_cuda.leaf(2 * u, *p) + u

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for n in (2, 7, 4):
        u, _, g = draw((n, 3, 4, 5), [(1,)] * 4, dtype=torch.float32)
        for layout in ("contiguous", "channels_last"):
            x = LAYOUTS[layout](u)
            for a, b in zip(evaluate(compiled, x, parameters, g), evaluate(function, x, parameters, g)):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_compile_once(dynamic):
    """Calls of the same shape run what the first call compiled; with dynamic shapes, so do calls of other shapes."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = leaf_cuda.LEAF.per_channel(3, init_as="SiLU")
    compiled = torch.compile(module, fullgraph=True, backend=graphs, dynamic=dynamic)

    def train(n):
        u = torch.randn(n, 3, 4, 5, requires_grad=True)
        compiled(u).square().sum().backward()
        assert u.grad is not None

    for _ in range(4):
        train(6)
    assert graphs.frame_count == 1
    for n in (7, 8, 9, 6):
        train(n)
    assert graphs.frame_count == {True: 1, False: 4, None: 2}[dynamic]


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
def test_compile_keeps_strides(layout, backend):
    """y and du have the same strides as in eager mode."""
    torch._dynamo.reset()
    u, parameters, g = draw(*GRANULARITIES["channel"](2, 3, 4, 5), dtype=torch.float32)
    u, g = LAYOUTS[layout](u), LAYOUTS[layout](g)
    compiled = torch.compile(leaf_cuda.leaf, fullgraph=True, backend=backend)
    results, expected = (evaluate(f, u, parameters, g)[:2] for f in (compiled, leaf_cuda.leaf))
    assert [r.stride() for r in results] == [e.stride() for e in expected]


def test_compile_of_a_module():
    torch._dynamo.reset()
    module = leaf_cuda.LEAF.per_channel(3)
    u = torch.randn(2, 3, 4, 5)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(u)
    assert torch.equal(y, module(u))
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


# ---- CUDA graphs ------------------------------------------------------------------------------------------------------


def cuda_graph_case(granularity):
    shape, shapes = GRANULARITIES[granularity](16, 8, 12, 20)
    u, parameters, g = draw(shape, shapes, dtype=torch.float32, device="cuda")
    return u, [p.requires_grad_() for p in parameters], g


@pytest.mark.cuda
@pytest.mark.usefixtures("needs_cuda")
@pytest.mark.parametrize("granularity", ["layer", "channel", "features"])
def test_cuda_graph(granularity):
    """Forward and backward, captured once and replayed with other numbers."""
    u, parameters, g = cuda_graph_case(granularity)
    u.requires_grad_()

    def step():
        return torch.autograd.grad(leaf_cuda.leaf(u, *parameters), [u, *parameters], g)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            u.copy_(torch.randn_like(u))
        graph.replay()
        assert all(torch.equal(c, e) for c, e in zip(captured, step()))


@pytest.mark.cuda
@pytest.mark.usefixtures("needs_cuda")
@pytest.mark.parametrize("granularity", ["layer", "channel", "features"])
def test_compile_with_reduced_overhead(granularity):
    torch._dynamo.reset()
    u, parameters, g = cuda_graph_case(granularity)
    compiled = torch.compile(lambda *a: leaf_cuda.leaf(*a) * 2, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        u = torch.randn_like(u)
        expected = evaluate(lambda *a: leaf_cuda.leaf(*a) * 2, u, parameters, g)
        for a, e in zip(evaluate(compiled, u, parameters, g), expected):
            torch.testing.assert_close(a, e)


# ---- which kernels run -----------------------------------------------------------------------------------------------


def test_backend_for():
    assert leaf_cuda.backend_for(torch.empty(0)) == "cpu"
    assert leaf_cuda.backend_for(torch.empty(0, device="meta")) == "composite"


def test_build_info():
    info = leaf_cuda.build_info()
    built = {"version", "torch", "compiler", "openmp", "cuda", "cuda_architectures"}
    assert info.keys() == built | {"cpu_instruction_set"}
    assert info["openmp"] == info["compiler"].startswith("GCC")  # else the kernels would silently run on one thread
    assert info["version"] == leaf_cuda.__version__
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["cpu_instruction_set"] in ("DEFAULT", "AVX2", "AVX512")
    assert (info["cuda"] is None) == (info["cuda_architectures"] is None)


@pytest.mark.parametrize(
    "file", ["golden", "layouts", "special_values", pytest.param("accuracy", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("capability, expected", [("default", "DEFAULT"), ("avx2", "AVX2")])
def test_other_instruction_sets(capability, expected, file):
    """The loops for older processors, chosen by ATEN_CPU_CAPABILITY, pass the numerical tests, too."""
    if leaf_cuda.build_info()["cpu_instruction_set"] == "DEFAULT":
        pytest.skip("this processor has one instruction set only")
    program = f"""
import leaf_cuda, pytest, sys
assert leaf_cuda.build_info()["cpu_instruction_set"] == {expected!r}
sys.exit(pytest.main(["-q", "-x", "-m", "not slow and not emulated and not cuda", "test_{file}.py"]))
"""
    # Run in the tests' folder: the root has leaf_cuda's source, which has no build.
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_compile_of_an_unknown_size():
    """An unbacked size of u that must equal one of a parameter: whether it does is checked at the call."""
    torch._dynamo.reset()
    compiled = torch.compile(leaf_cuda.leaf, fullgraph=True, backend="aot_eager")
    for channels in (4, 7):
        u, p = torch.randn(3, channels, 5), torch.randn(channels, 1)
        torch._dynamo.decorators.mark_unbacked(u, 1)
        torch.testing.assert_close(compiled(u, p, p, p, p), leaf_cuda.leaf(u, p, p, p, p))
    u = torch.randn(3, 6, 5)
    torch._dynamo.decorators.mark_unbacked(u, 1)
    with pytest.raises(ValueError, match=r"p1 of shape \[7, 1\] does not broadcast to u of shape \[3, 6, 5\]"):
        compiled(u, p, p, p, p)


@pytest.fixture
def no_cpu_kernel(remove_kernels):
    remove_kernels()


def test_fallback(no_cpu_kernel):
    """The formula runs, correct in every dtype, with one warning per process."""
    assert leaf_cuda.backend_for(torch.empty(0)) == "composite"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype, parameter_dtype in DTYPE_PAIRS:
            for granularity in ("channel", "mixed", "no_p2", "ahaf"):
                shape, shapes = GRANULARITIES[granularity](2, 3, 4, 5)
                u, parameters, g = draw(shape, shapes, dtype=dtype, parameter_dtype=parameter_dtype)
                results = evaluate(leaf_cuda.leaf, u, parameters, g)
                assert results[0].dtype == dtype
                if dtype in (torch.float32, torch.float64):
                    assert_true(results, u, parameters, g)
                else:
                    assert_true(results[:1], u, parameters, g)
        leaf_cuda.LEAF()(torch.ones(3))
    assert [w.category for w in caught] == [leaf_cuda.FallbackWarning]
    message = str(caught[0].message)
    assert "'cpu'" in message and "formula" in message
    assert caught[0].filename == __file__.replace("test_operators", "cases")  # the file that called leaf


@pytest.mark.parametrize(
    "call",
    [
        lambda u: leaf_cuda.leaf(u, torch.ones(1), None, torch.ones(1), None),
        lambda u: leaf_cuda.ahaf(u, torch.ones(1), torch.ones(1)),
        lambda u: torch.nn.Sequential(leaf_cuda.LEAF())(u),
        lambda u: leaf_cuda.nn.LeafGRU(3, 2)(u),
        lambda u: torch.compile(leaf_cuda.LEAF(), fullgraph=True, backend="eager")(u),
    ],
    ids=["function", "ahaf", "module", "recurrent", "compiled"],
)
def test_fallback_names_the_callers_line(no_cpu_kernel, call):
    with pytest.warns(leaf_cuda.FallbackWarning) as caught:
        call(torch.ones(4, 3))
    assert caught[0].filename == __file__


def test_fallback_in_code_of_no_module(no_cpu_kernel):
    with pytest.warns(leaf_cuda.FallbackWarning):
        exec("leaf_cuda.LEAF()(u)", {"leaf_cuda": leaf_cuda, "u": torch.ones(3)})


def test_fallback_checks_its_arguments(no_cpu_kernel):
    with pytest.raises(ValueError, match=r"p3 of shape \[4\]"):
        leaf_cuda.leaf(torch.ones(4, 5), torch.ones(1), None, torch.ones(4), None)
    with pytest.raises(TypeError, match="p1 has dtype torch.float64"):
        leaf_cuda.leaf(torch.ones(4, 5), torch.ones(1).double(), None, torch.ones(1).double(), None)
    with pytest.raises(ValueError, match="p1 is on meta"):
        leaf_cuda.leaf(torch.ones(4, 5), torch.ones(1, device="meta"), None, torch.ones(1), None)


def test_no_warning_with_kernels():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leaf_cuda.leaf(torch.ones(3, requires_grad=True), torch.ones(1), None, torch.ones(1), None).sum().backward()
