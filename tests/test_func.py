"""torch.func and forward mode: every transform of LEAF equals that of the formula, and uses the fused kernels."""

import pytest
import torch
from cases import GRANULARITIES, assert_true, draw, plain
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves

import leaf_cuda

FORWARD, BACKWARD = torch.ops.leaf_cuda.leaf_forward, torch.ops.leaf_cuda.leaf_backward

ALL = (0, 1, 2, 3, 4)


@pytest.fixture(autouse=True)
def no_loop_over_the_batch():
    """vmap raises if it has no rule for an operator, instead of looping over the batch."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def loss(f):
    return lambda *arguments: f(*arguments).sin().sum()


def assert_same(transform, *routes):
    expected = tree_leaves(transform(plain))
    for route in routes:
        results = tree_leaves(transform(route))
        assert len(results) == len(expected) > 0
        for result, e in zip(results, expected):
            assert result.shape == e.shape
            torch.testing.assert_close(result, e, rtol=1e-10, atol=1e-12)


def inputs(device, shape=(3, 4), shapes=((3, 1), (4,), (), (3, 4))):
    u, parameters, _ = draw(shape, shapes, device=device)
    return u, *parameters


#: name → a transform of f at (u, p1, ..., p4).
TRANSFORMS = {
    "grad": lambda f, *a: grad(loss(f), ALL)(*a),
    "vjp": lambda f, *a: vjp(f, *a)[1](torch.cos(a[0])),
    "grad_of_grad": lambda f, *a: grad(lambda *b: sum(t.sin().sum() for t in grad(loss(f), ALL)(*b)), ALL)(*a),
    "third": lambda f, u, *p: grad(
        lambda x: grad(lambda x: grad(lambda x: loss(f)(x, *p))(x).sin().sum())(x).sin().sum()
    )(u),
    "jacrev": lambda f, *a: jacrev(f, ALL)(*a),
    "jacrev_of_jacrev": lambda f, *a: jacrev(jacrev(loss(f), ALL), ALL)(*a),
}
FORWARD_TRANSFORMS = {
    "jvp": lambda f, *a: jvp(f, a, tuple(t.cos() for t in a)),
    "jvp_of_jvp": lambda f, *a: jvp(lambda *b: jvp(f, b, b), a, tuple(t.cos() for t in a)),
    "jacfwd": lambda f, *a: jacfwd(f, ALL)(*a),
    "jacfwd_of_jacfwd": lambda f, *a: jacfwd(jacfwd(loss(f), ALL), ALL)(*a),
    "jacrev_of_jacfwd": lambda f, *a: jacrev(jacfwd(loss(f), ALL), ALL)(*a),
    "hessian": lambda f, *a: hessian(loss(f), ALL)(*a),
    "jvp_of_vjp": lambda f, *a: jvp(vjp(f, *a)[1], (a[0].cos(),), (a[0].sin(),)),
    "linearize": lambda f, *a: linearize(f, *a)[1](*a),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(device, route, transform):
    arguments = inputs(device)
    assert_same(lambda f: TRANSFORMS[transform](f, *arguments), route)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*get_attr")  # PyTorch's own
@pytest.mark.parametrize("route", [leaf_cuda.leaf, FORWARD], ids=["leaf", "operator"])
@pytest.mark.parametrize("transform", FORWARD_TRANSFORMS)
def test_forward_transforms(device, route, transform):
    arguments = inputs(device)
    assert_same(lambda f: FORWARD_TRANSFORMS[transform](f, *arguments), route)


@pytest.mark.parametrize("route", [leaf_cuda.leaf, FORWARD], ids=["leaf", "operator"])
@pytest.mark.parametrize("transform", ["alone", "of_grad", "of_vmap", "of_vmap_of_grad", "in_vmap"])
def test_functionalize(device, route, transform):
    """Under functionalize, which does not support torch.autograd.Function."""
    in_dims = IN_DIMS[0]
    arguments = inputs(device) if transform in ("alone", "of_grad") else batched(inputs(device), in_dims)
    transforms = {
        "alone": functionalize,
        "of_grad": lambda f: functionalize(grad(loss(f), ALL)),
        "of_vmap": lambda f: functionalize(vmap(f, in_dims)),
        "of_vmap_of_grad": lambda f: functionalize(vmap(grad(loss(f), ALL), in_dims)),
        "in_vmap": lambda f: vmap(functionalize(f), in_dims),
    }
    assert_same(lambda f: transforms[transform](f)(*arguments), route)


def test_leaf_function_has_no_forward_mode():
    u, *parameters = inputs("cpu")
    with pytest.raises(RuntimeError, match="jvp"):
        jvp(lambda u: leaf_cuda.LeafFunction.apply(u, *parameters), (u,), (u,))


#: in_dims of (u, p1, ..., p4): the batch in u, in parameters, in both, first, last and in the middle.
IN_DIMS = [
    (0, None, None, None, None),
    (2, None, None, None, None),
    (-1, 0, None, None, None),
    (None, 0, None, None, None),
    (None, 0, 1, -1, 1),
    (1, 0, 0, 0, 0),
    (None, None, None, None, 1),
]


def batched(arguments, in_dims, size=5):
    return [
        t if dim is None else torch.stack([t * (1 + 0.1 * k) for k in range(size)], dim)
        for t, dim in zip(arguments, in_dims)
    ]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap(device, route, in_dims):
    arguments = batched(inputs(device), in_dims)
    assert_same(lambda f: vmap(f, in_dims, out_dims=1)(*arguments), route)


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap_of_grad(device, route, in_dims):
    """One gradient per sample, for inputs that are batched and for those that are not."""
    arguments = batched(inputs(device), in_dims)
    assert_same(lambda f: vmap(grad(loss(f), ALL), in_dims)(*arguments), route)


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_grad_of_vmap(device, route, in_dims):
    arguments = batched(inputs(device), in_dims)
    assert_same(lambda f: grad(lambda *a: vmap(loss(f), in_dims)(*a).sum(), ALL)(*arguments), route)


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_backward_through_vmap(device, route, in_dims):
    """Backward by torch.autograd, which is not one of torch.func's transforms."""
    arguments = [t.requires_grad_() for t in batched(inputs(device), in_dims)]
    assert_same(lambda f: torch.autograd.grad(vmap(f, in_dims)(*arguments).sin().sum(), arguments), route)


@pytest.mark.parametrize("in_dims", [IN_DIMS[1], IN_DIMS[3], IN_DIMS[4]], ids=str)
def test_vmap_of_vmap(device, route, in_dims):
    arguments = batched(batched(inputs(device), in_dims), IN_DIMS[0], 2)
    assert_same(lambda f: vmap(vmap(grad(loss(f), ALL), in_dims), IN_DIMS[0])(*arguments), route)


@pytest.mark.parametrize("in_dims", [IN_DIMS[0], IN_DIMS[4]], ids=str)
def test_vmap_of_hessian(device, in_dims):
    arguments = batched(inputs(device), in_dims)
    assert_same(lambda f: vmap(hessian(loss(f), ALL), in_dims)(*arguments), leaf_cuda.leaf, FORWARD)


def test_parameters_of_more_dimensions_than_u(device, route):
    arguments = inputs(device, (4,), [(1, 1, 4), (1, 1), (), (4,)])
    in_dims = (0, 2, None, 0, None)
    assert_same(lambda f: grad(lambda *a: loss(f)(*a), ALL)(*arguments), route)
    batch = batched(arguments, in_dims)
    u, *parameters = arguments
    # vmap of the formula itself would broadcast y to (1, 1, 4).
    one_by_one = [
        grad(loss(plain), ALL)(*(t if d is None else t.select(d, k) for t, d in zip(batch, in_dims))) for k in range(5)
    ]
    for result, expected in zip(vmap(grad(loss(route), ALL), in_dims)(*batch), zip(*one_by_one)):
        torch.testing.assert_close(result, torch.stack(expected))


@pytest.mark.parametrize("in_dim", [None, 0])
def test_vmap_checks_shapes(route, in_dim):
    """A parameter of more dimensions than u does not broadcast along the batch."""
    u, one, p1 = torch.randn(5, 4), torch.ones(4), torch.ones(5, 5, 4)
    with pytest.raises(ValueError, match=r"p1 of shape .*5, 4\] does not broadcast to u of shape \[5, 4\]"):
        vmap(route, (0, in_dim, None, None, None))(u, p1[0] if in_dim is None else p1, one, one, one)


@pytest.mark.parametrize("missing", ["no_p2", "no_p4", "ahaf"])
def test_missing_parameters(device, route, missing):
    shape, shapes = GRANULARITIES[missing](2, 3, 2, 2)
    u, parameters, _ = draw(shape, shapes, device=device)
    given = [p for p in parameters if p is not None]

    def of_given(f):
        def function(u, *given):
            rest = iter(given)
            return loss(f)(u, *(None if p is None else next(rest) for p in parameters))

        return function

    numbers = tuple(range(len(given) + 1))
    in_dims = (0, *[None] * len(given))
    assert_same(lambda f: grad(of_given(f), numbers)(u, *given), route)
    assert_same(lambda f: vmap(grad(of_given(f), numbers), in_dims)(u, *given), route)


@pytest.mark.parametrize("dtype, parameter_dtype", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_half_precision(device, dtype, parameter_dtype):
    shape, shapes = GRANULARITIES["channel"](5, 3, 4, 2)
    u, parameters, g = draw(shape, shapes, dtype=dtype, parameter_dtype=parameter_dtype, device=device)

    def scaled(u, g, *p):
        return (leaf_cuda.leaf(u, *p).float() * g.float()).sum()

    in_dims = (0, 0, None, None, None, None)
    du, *dp = vmap(grad(scaled, (0, 2, 3, 4, 5)), in_dims)(u, g, *parameters)
    for k in range(5):
        y = leaf_cuda.leaf(u[k], *parameters)
        assert_true([y, du[k], *(d[k] for d in dp)], u[k], parameters, g[k])
    _, tangent = jvp(lambda u: leaf_cuda.leaf(u, *parameters), (u,), (g,))
    torch.testing.assert_close(tangent, du)


# ---- what runs -------------------------------------------------------------------------------------------------------


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators that reach the kernels, by name."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        self.names.append(function._schema.name.split("::")[1])
        return function(*arguments, **(kwargs or {}))


@pytest.mark.parametrize("function", [leaf_cuda.leaf, leaf_cuda.LeafFunction.apply], ids=["leaf", "LeafFunction"])
def test_one_kernel_for_a_batch(function):
    """Per-sample gradients take one call of the fused forward and one of the fused backward."""
    arguments = batched(inputs("cpu"), IN_DIMS[0])
    with Calls() as calls:
        vmap(grad(lambda *a: function(*a).sum(), ALL), IN_DIMS[0])(*arguments)
    assert [n for n in calls.names if n.startswith("leaf")] == ["leaf_forward", "leaf_backward"]
    assert "sigmoid" not in calls.names


def test_gradient_penalty_goes_by_the_fused_backward():
    u, *parameters = (t.requires_grad_() for t in inputs("cpu"))
    with Calls() as calls:
        (du,) = torch.autograd.grad(leaf_cuda.leaf(u, *parameters).sum(), u, create_graph=True)
    assert [n for n in calls.names if n.startswith("leaf")] == ["leaf_forward", "leaf_backward"]
    assert "sigmoid" not in calls.names
    du.square().sum().backward()
    assert all(t.grad is not None for t in (u, *parameters[:3]))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("transform", ["vmap", "vmap_of_grad", "jvp"])
def test_compiled(transform, backend):
    """Without a graph break."""
    torch._dynamo.reset()
    in_dims = IN_DIMS[0]
    arguments = batched(inputs("cpu"), in_dims)
    transformed = {
        "vmap": lambda f: vmap(f, in_dims),
        "vmap_of_grad": lambda f: vmap(grad(loss(f), ALL), in_dims),
        "jvp": lambda f: lambda u, *p: jvp(lambda u: f(u, *p), (u[0],), (u[1],)),
    }[transform]
    expected = tree_leaves(transformed(plain)(*arguments))
    results = tree_leaves(torch.compile(transformed(leaf_cuda.leaf), fullgraph=True, backend=backend)(*arguments))
    for result, e in zip(results, expected, strict=True):
        torch.testing.assert_close(result, e, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("transform", ["grad", "vjp", "grad_of_grad", "jacrev", "vmap", "vmap_of_grad"])
def test_compiled_beside_what_requires_grad(transform):
    """Results and their gradients, if parameters outside of the transform require gradients, as a module's do."""
    torch._dynamo.reset()
    u, *parameters = inputs("cpu")
    transformed = {
        "grad": lambda f: grad(loss(f)),
        "vjp": lambda f: lambda u: vjp(f, u)[1](u.cos())[0],
        "grad_of_grad": lambda f: grad(lambda u: loss(grad(loss(f)))(u)),
        "jacrev": jacrev,
        "vmap": lambda f: lambda u: vmap(f)(torch.stack([u, u.cos()])),
        "vmap_of_grad": lambda f: lambda u: vmap(grad(loss(f)))(torch.stack([u, u.cos()])),
    }[transform]

    def results(f, **options):
        trained = [p.clone().requires_grad_() for p in parameters]
        function = transformed(lambda u: f(u, *trained))
        y = torch.compile(function, **options)(u) if options else function(u)
        return y, *torch.autograd.grad(loss(lambda y: y)(y), trained, allow_unused=True, materialize_grads=True)

    for result, e in zip(results(leaf_cuda.leaf, fullgraph=True, backend="aot_eager"), results(plain), strict=True):
        torch.testing.assert_close(result, e, rtol=1e-10, atol=1e-12)


def test_leaf_function_compiled_inside_a_transform():
    """An error: Dynamo's gradient of an autograd.Function there is wrong."""
    torch._dynamo.reset()
    u, *parameters = inputs("cpu")
    trained = [p.requires_grad_() for p in parameters]
    transformed = grad(lambda u: loss(leaf_cuda.LeafFunction.apply)(u, *trained))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="call leaf_cuda.leaf"):
        torch.compile(transformed, backend="eager", fullgraph=True)(u)
    with pytest.raises((NotImplementedError, AssertionError)):  # the latter is Dynamo's own, after the graph break
        torch.compile(transformed, backend="eager")(u)


# ---- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [leaf_cuda.LEAF, leaf_cuda.AHAF])
def test_ensemble(device, make):
    """functional_call with stacked parameters under vmap equals the networks one by one."""
    networks = [
        torch.nn.Sequential(torch.nn.Linear(3, 4), make(size=(4,), init_as="SiLU"), torch.nn.Linear(4, 1)).to(
            device, torch.float64
        )
        for _ in range(3)
    ]
    parameters, buffers = stack_module_state(networks)
    x = torch.randn(5, 3, dtype=torch.float64, device=device)

    def square(p, b, x):
        return functional_call(networks[0], (p, b), (x,)).square().sum()

    gradients = vmap(grad(square), (0, 0, None))(parameters, buffers, x)
    for k, network in enumerate(networks):
        network(x).square().sum().backward()
        for name, p in network.named_parameters():
            torch.testing.assert_close(gradients[name][k], p.grad)
