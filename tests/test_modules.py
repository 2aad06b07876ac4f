"""LEAF and AHAF as modules: forms, sizes, dtypes, checkpoints."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from cases import FORMS, assert_true, evaluate
from torch import nn
from torch.nn import functional as F

from leaf_cuda import AHAF, LEAF

KINDS = pytest.mark.parametrize("kind", [LEAF, AHAF])
HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
NAMES = {LEAF: ["p1", "p2", "p3", "p4"], AHAF: ["gamma", "beta"]}


def values(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def assert_same_values(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# ---- forms and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [f for f in FORMS if f != "Swish"])
def test_forms_of_leaf(form):
    module = LEAF(init_as=form, dtype=torch.float64)
    assert tuple(p.item() for p in module.parameters()) == FORMS[form]


@pytest.mark.parametrize("form", ["ReLU", "SiLU", "CUSTOM", "GELU"])
def test_forms_of_ahaf(form):
    module = AHAF(init_as=form, dtype=torch.float64)
    assert (module.beta.item(), module.gamma.item()) == (FORMS[form][0], FORMS[form][2])


def test_explicit_forms():
    assert tuple(p.item() for p in LEAF(init_as=("Swish", 1.5)).parameters()) == (1, 0, 1.5, 0)
    assert tuple(p.item() for p in LEAF(init_as=(0.5, -1, 2, 3)).parameters()) == (0.5, -1, 2, 3)
    assert tuple(p.item() for p in LEAF(init_as=[0.5, -1, 2, 3]).parameters()) == (0.5, -1, 2, 3)
    assert [AHAF(init_as=("Swish", 1.5)).gamma.item(), AHAF(init_as=(0.5, 0, 2, 0)).beta.item()] == [1.5, 0.5]
    assert LEAF().init_as == AHAF().init_as == "ReLU"


@pytest.mark.parametrize(
    "form, activation, tolerance",
    [
        ("ReLU", F.relu, 5e-6),  # at most 0.2785/2^16, at u = 1.2785/2^16
        ("SiLU", F.silu, 1e-6),
        ("Tanh", torch.tanh, 1e-6),
        ("Sigmoid", torch.sigmoid, 1e-6),
        ("Identity", lambda u: u, 0.0),
        ("GELU", lambda u: u * torch.sigmoid(1.702 * u), 1e-6),
        (("Swish", 1.5), lambda u: u * torch.sigmoid(1.5 * u), 1e-6),
        ("CUSTOM", lambda u: u * torch.sigmoid(10 * u), 1e-6),
    ],
)
def test_forms_equal_their_activations(device, form, activation, tolerance):
    u = torch.cat([torch.linspace(-6, 6, 2_001), torch.linspace(-1e-3, 1e-3, 2_001)]).to(device)
    torch.testing.assert_close(LEAF(init_as=form, device=device)(u), activation(u), rtol=tolerance, atol=tolerance)
    if form not in ("Tanh", "Sigmoid", "Identity"):
        torch.testing.assert_close(AHAF(init_as=form, device=device)(u), activation(u), rtol=tolerance, atol=tolerance)


def test_slope_of_the_relu_form_at_0(device):
    u = torch.zeros(5, device=device, requires_grad=True)
    LEAF(device=device)(u).sum().backward()
    assert torch.equal(u.grad, torch.full_like(u, 0.5))


@KINDS
@pytest.mark.parametrize(
    "make, size, shape",
    [
        (lambda kind: kind(), (1,), (2, 3)),
        (lambda kind: kind(size=7), (7,), (2, 7)),
        (lambda kind: kind(size=(3, 4)), (3, 4), (2, 3, 4)),
        (lambda kind: kind(size=torch.Size([3, 1, 1])), (3, 1, 1), (2, 3, 4, 5)),
        (lambda kind: kind.per_layer(), (1,), (2, 3)),
        (lambda kind: kind.per_channel(3), (3, 1, 1), (2, 3, 4, 5)),
        (lambda kind: kind.per_channel(3, spatial_dims=0), (3,), (2, 5, 3)),
        (lambda kind: kind.per_channel(3, spatial_dims=1), (3, 1), (2, 3, 5)),
        (lambda kind: kind.per_channel(3, 3), (3, 1, 1, 1), (2, 3, 2, 2, 2)),
        (lambda kind: kind.per_element((3, 4, 5)), (3, 4, 5), (2, 3, 4, 5)),
        (lambda kind: kind.per_element(6), (6,), (2, 6)),
    ],
)
def test_sizes(device, kind, make, size, shape):
    module = make(kind).to(device)
    assert module.size == size
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {name: size for name in NAMES[kind]}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    nn.init.normal_(module.get_parameter(NAMES[kind][0]))
    u, g = torch.randn(shape, device=device), torch.randn(shape, device=device)
    if kind is LEAF:
        parameters = [module.p1, module.p2, module.p3, module.p4]
        results = evaluate(
            lambda u, *p: torch.func.functional_call(module, dict(zip(NAMES[LEAF], p)), u), u, parameters, g
        )
    else:
        parameters = [module.beta, None, module.gamma, None]
        results = evaluate(
            lambda u, beta, _, gamma, __: torch.func.functional_call(module, {"beta": beta, "gamma": gamma}, u),
            u,
            parameters,
            g,
        )
    assert_true(results, u, parameters, g)


@KINDS
def test_constructors_pass_arguments_on(kind):
    for make in (kind.per_layer, lambda **k: kind.per_channel(3, **k), lambda **k: kind.per_element((2, 3), **k)):
        module = make(init_as="SiLU", dtype=torch.float64, device="meta", keep_float32=False)
        assert module.init_as == "SiLU" and module.keep_float32 is False
        assert all(p.dtype == torch.float64 and p.device.type == "meta" for p in module.parameters())


def test_repr():
    assert repr(LEAF()) == "LEAF(size=(1,), init_as='ReLU')"
    assert repr(AHAF.per_channel(8, init_as=("Swish", 2.0))) == "AHAF(size=(8, 1, 1), init_as=('Swish', 2.0))"
    assert repr(LEAF(keep_float32=False)) == "LEAF(size=(1,), init_as='ReLU', keep_float32=False)"


@KINDS
def test_reset_parameters(kind):
    module = kind(size=(3,), init_as="SiLU")
    before = copy.deepcopy(values(module))
    for p in module.parameters():
        nn.init.normal_(p)
    assert not torch.equal(module.get_parameter(NAMES[kind][0]), before[NAMES[kind][0]])
    module.reset_parameters()
    assert_same_values(values(module), before)


@KINDS
def test_meta_device(kind):
    module = kind(size=(3,), device="meta")
    assert all(p.is_meta for p in module.parameters())
    assert module(torch.empty(2, 3, device="meta")).shape == (2, 3)
    module.to_empty(device="cpu").reset_parameters()
    assert_same_values(values(module), values(kind(size=(3,))))


# ---- dtypes ----------------------------------------------------------------------------------------------------------

CONVERSIONS = {
    "half": lambda m, half: m.half() if half == torch.float16 else m.bfloat16(),
    "to(dtype)": lambda m, half: m.to(half),
    "to(device, dtype)": lambda m, half: m.to("cpu", half),
    "to(tensor)": lambda m, half: m.to(torch.empty(0, dtype=half)),
    "type": lambda m, half: m.type(half),
    "within a model": lambda m, half: nn.Sequential(nn.Linear(2, 2), nn.Sequential(m)).to(half)[1][0],
}


@KINDS
@HALVES
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_parameters_stay_in_float32(kind, conversion, half):
    module = kind(size=(5,))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))  # numbers that float16 cannot hold
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    before, gradients = copy.deepcopy(values(module)), [p.grad.clone() for p in module.parameters()]
    converted = CONVERSIONS[conversion](module, half)
    assert_same_values(values(converted), before)
    for p, gradient in zip(converted.parameters(), gradients):
        assert p.grad.dtype == torch.float32 and torch.equal(p.grad, gradient)
    y = converted(torch.tensor([[-1.0, 0.0, 2.0, 1e-3, 5.0]], dtype=half))
    assert y.dtype == half and y.isfinite().all()


@KINDS
@HALVES
def test_float64_modules_become_float32(kind, half):
    module = kind(dtype=torch.float64).to(half)
    assert_same_values(values(module), values(kind()))


@KINDS
def test_conversions_to_wider_dtypes(kind):
    module = kind().double()
    assert all(p.dtype == torch.float64 for p in module.parameters())
    assert module(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert all(p.dtype == torch.float32 for p in module.float().parameters())


@KINDS
@HALVES
def test_opt_out(kind, half):
    module = kind(init_as="SiLU", keep_float32=False)
    assert module.state_dict().keys() == kind().state_dict().keys()
    assert all(p.dtype == half for p in module.to(half).parameters())
    assert module(torch.ones(3, dtype=half)).dtype == half
    loaded = kind(init_as="SiLU", keep_float32=False)
    loaded.load_state_dict({k: v.to(half) for k, v in loaded.state_dict().items()}, assign=True)
    assert all(p.dtype == half for p in loaded.parameters())


@KINDS
@HALVES
def test_half_parameters_on_request(kind, half):
    module = kind(init_as="SiLU", dtype=half)
    assert all(p.dtype == half for p in module.parameters())
    assert module(torch.ones(3, dtype=half)).dtype == half
    assert all(p.dtype == torch.float32 for p in module.float().parameters())


def test_relu_in_bfloat16():
    assert LEAF(dtype=torch.bfloat16).p3.item() == 65536


@HALVES
def test_default_dtype(half):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(half)
        assert all(p.dtype == torch.float32 for p in LEAF().parameters())
        torch.set_default_dtype(torch.float64)
        assert all(p.dtype == torch.float64 for p in LEAF().parameters())
    finally:
        torch.set_default_dtype(before)


@KINDS
def test_autocast(device, kind):
    model = nn.Sequential(nn.Linear(4, 6), kind(size=(6,))).to(device)
    before = copy.deepcopy(values(model[1]))
    with torch.autocast(device, dtype=torch.bfloat16):
        y = model(torch.randn(8, 4, device=device))
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert_same_values(values(model[1]), before)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model[1].parameters())


# ---- checkpoints and copies ------------------------------------------------------------------------------------------


@KINDS
def test_state_dict(kind):
    module = kind(size=(3,))
    for p in module.parameters():
        nn.init.normal_(p)
    assert list(module.state_dict()) == NAMES[kind]
    other = kind(size=(3,), init_as="SiLU")
    assert str(other.load_state_dict(module.state_dict())) == "<All keys matched successfully>"
    assert_same_values(values(other), values(module))
    with pytest.raises(RuntimeError, match="size mismatch"):
        kind(size=(4,)).load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        kind(size=(3,)).load_state_dict({})


@KINDS
@HALVES
@pytest.mark.parametrize("assign", [False, True])
def test_half_checkpoints(kind, half, assign):
    checkpoint = {f"0.{name}": torch.randn(3).to(half) for name in NAMES[kind]}
    given = dict(checkpoint)
    model = nn.Sequential(kind(size=(3,), device="meta" if assign else None))
    model.load_state_dict(checkpoint, assign=assign)
    assert checkpoint.keys() == given.keys() and all(checkpoint[k] is given[k] for k in given)
    for name, p in model.named_parameters():
        assert p.requires_grad and p.dtype == torch.float32 and torch.equal(p, checkpoint[name].float())


@KINDS
def test_values_that_low_precision_has_lost_are_told(kind):
    """2^16 becomes infinite in float16, and its value is lost."""
    name = {LEAF: "p3", AHAF: "gamma"}[kind]
    model = nn.Sequential(kind())
    with pytest.warns(UserWarning, match=f"^0.{name} is infinite in torch.float16") as told:
        model.load_state_dict({k: v.half() for k, v in model.state_dict().items()})
    assert len(told) == 1 and told[0].filename == __file__
    with pytest.warns(UserWarning, match=f"^{name} is infinite in torch.float16"):
        kind(keep_float32=False).half()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(keep_float32=False).bfloat16()
        kind().half()
        kind().load_state_dict({k: v.bfloat16() for k, v in kind().state_dict().items()})


@KINDS
def test_assigned_float32_checkpoint(kind):
    checkpoint = {name: torch.randn(3) for name in NAMES[kind]}
    module = kind(size=(3,))
    module.load_state_dict(checkpoint, assign=True)
    assert all(p.data_ptr() == checkpoint[name].data_ptr() for name, p in module.named_parameters())


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@KINDS
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies(kind, make):
    module = kind(size=(3, 1), init_as=("Swish", 2.0), keep_float32=False)
    for p in module.parameters():
        nn.init.normal_(p)
    other = make(module)
    assert repr(other) == repr(module)
    assert_same_values(values(other), values(module))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(module.parameters(), other.parameters()))
    u = torch.randn(2, 3, 4)
    assert torch.equal(module(u), other(u))


# ---- training --------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("optimizer, rate", [(torch.optim.SGD, 0.5), (torch.optim.Adam, 0.02)])
def test_training_reduces_the_loss(device, kind, optimizer, rate):
    """Training only the activation's parameters."""
    u = torch.randn(256, 8).to(device)
    target = F.silu(1.7 * u)
    module = kind(size=(8,), init_as="SiLU", device=device)
    steps = optimizer(module.parameters(), lr=rate)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(module(u), target)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[1] < losses[0] and losses[-1] < 0.5 * losses[0]
    initial = kind(size=(8,), init_as="SiLU", device=device)
    assert all((p != q).all() for p, q in zip(module.parameters(), initial.parameters()))
