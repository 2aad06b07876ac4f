"""leaf_cuda.convert: which activations are replaced, by what, and that the model is otherwise unchanged."""

import collections
import contextlib
import copy
import functools
import math
import pickle
import random
import threading
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leaf_cuda import AHAF, LEAF
from leaf_cuda.convert import freeze_weights, replace_activations
from leaf_cuda.fixed_activations import FIXED, is_in_place
from leaf_cuda.models import LeNet5
from leaf_cuda.nn import CellLEAF, LeafGLU, LeafGRUCell, LeafLSTM
from leaf_cuda.tracing import fixed_equal_to


def make_forward(body):
    """A module with two linear layers and `body(self, x)` for its forward."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(6, 6)
            self.fc2 = nn.Linear(6, 6)
            self.values = []
            self.table = {"calls": 0, "mean": torch.ones(())}
            self.register_buffer("steps", torch.zeros(()))
            self.norm = nn.BatchNorm1d(6)
            self.state = SimpleNamespace(calls=0, log=[], seen=collections.Counter(calls=5))
            self.python, self.numpy = random.Random(0), numpy.random.default_rng(0)
            self.generator = torch.Generator()

        def forward(self, x):
            return body(self, x)

    torch.manual_seed(0)
    return Net()


X = torch.linspace(-4, 4, 60).reshape(10, 6)
EXACT = {"ReLU": 5e-6, "SiLU": 4e-15, "Tanh": 1e-15, "Sigmoid": 1e-15}
NEAR = {"GELU": 0.0204, "Hardswish": 0.1243, "Hardsigmoid": 0.0563}
CALLS = {
    "ReLU": [F.relu, torch.relu, lambda x: x.relu(), lambda x: F.relu(x, True), lambda x: x.clone().relu_(), F.relu_]
    + [lambda x: torch.relu(input=x)],
    "SiLU": [F.silu, lambda x: F.silu(x, inplace=True)],
    "Tanh": [torch.tanh, F.tanh, lambda x: x.tanh(), lambda x: x.tanh_()],
    "Sigmoid": [torch.sigmoid, F.sigmoid, torch.special.expit, lambda x: x.sigmoid(), torch.sigmoid_],
    "GELU": [F.gelu, lambda x: F.gelu(x, approximate="tanh")],
    "Hardswish": [F.hardswish],
    "Hardsigmoid": [F.hardsigmoid],
}


@pytest.mark.parametrize("name", EXACT | NEAR)
def test_forms(name):
    """The reported difference is the form's: on a finer grid it is no larger, and the output differs by no more."""
    fixed = getattr(nn, name)()
    model = nn.Sequential(fixed)
    u = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    report = replace_activations(model, example_inputs=u)
    (replaced,) = report.replaced
    bound = (EXACT | NEAR)[name]
    assert replaced.difference <= bound and report.output_difference <= bound + 2e-6
    torch.testing.assert_close(model(u), fixed(u), rtol=0, atol=bound + 2e-6)
    if name in NEAR:  # and it is no smaller than documented
        assert replaced.difference > 0.98 * bound


@pytest.mark.parametrize("name, call", [(name, call) for name, calls in CALLS.items() for call in calls])
def test_calls(name, call):
    model = make_forward(lambda self, x: self.fc2(call(self.fc1(x))))
    before = model(X)
    (replaced,) = replace_activations(
        model, rules={getattr(nn, name): getattr(nn, name).__name__ if name in EXACT else "GELU"}
    ).replaced
    assert isinstance(getattr(model, replaced.name), LEAF)
    if name in EXACT:
        torch.testing.assert_close(model(X), before, rtol=0, atol=1e-5)
    model(X).sum().backward()
    assert getattr(model, replaced.name).p1.grad.abs() > 0


def test_function_in_attribute():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = F.silu

        def forward(self, x):
            return self.act(x)

    model = Net()
    report = replace_activations(model)
    assert [(r.name, r.old) for r in report.replaced] == [("act", "function silu")] and isinstance(model.act, LEAF)
    torch.testing.assert_close(model(X), F.silu(X))


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.ReLU(), nn.GELU()])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_transformer_layer(activation, granularity):
    """In eval mode torch's layer has a fast path of its own, which must not compute the fixed activation."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 5, 8)
    report = replace_activations(model, granularity=granularity, channel_dim=-1, example_inputs=x)
    assert [r.name for r in report.replaced] == ["layers.0.activation", "layers.1.activation"]
    assert model.layers[1].activation.p1.shape == {"layer": (1,), "channel": (16,)}[granularity]
    assert report.output_difference < 0.02
    model.eval()
    with torch.no_grad():
        before = model(x)
        model.layers[1].activation.p1 += 1
        assert (model(x) - before).abs().max() > 0.05


@pytest.mark.parametrize(
    "granularity, channel_dim, sizes",
    [
        ("layer", 1, [(1,), (1,)]),
        ("channel", 1, [(8, 1, 1), (5,)]),
        ("channel", -1, [(6,), (5,)]),
        ("element", 1, [(8, 6, 6), (5,)]),
    ],
)
def test_sizes(granularity, channel_dim, sizes):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5), nn.Tanh())
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    report = replace_activations(model, granularity=granularity, channel_dim=channel_dim, example_inputs=x)
    assert [model[1].size, model[4].size] == sizes
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    assert report.output_difference <= 1e-5 and model.training


def test_networks():
    """In the paper's networks, fixed activations become the LEAFs that the networks can be made with."""
    model = LeNet5((1, 28, 28))
    replace_activations(model, granularity="element", example_inputs=torch.randn(1, 1, 28, 28))
    assert sum(p.numel() for p in model.parameters()) == 431_000 + 60_880
    ahaf = LeNet5((1, 28, 28))
    report = replace_activations(ahaf, AHAF)
    assert [type(ahaf.get_submodule(r.name)) for r in report.replaced] == 3 * [AHAF]


def test_rules():
    class Mine(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(3 * x)

    def model():
        return nn.ModuleDict(
            {
                "body": nn.Sequential(nn.ReLU(), nn.LeakyReLU(), nn.ReLU(), Mine()),
                "head": nn.Sequential(nn.ReLU(), nn.SiLU()),
            }
        )

    net = model()
    rules = {
        "head.*": None,
        nn.LeakyReLU: "ReLU",
        Mine: ("Swish", 3),
        "body.2": {"kind": AHAF, "init_as": "SiLU"},
        nn.ReLU: {"granularity": "layer"},
        "tail": None,
    }
    report = replace_activations(net, rules=rules)
    assert [repr(m) for m in net["body"]] == [
        "LEAF(size=(1,), init_as='ReLU')",
        "LEAF(size=(1,), init_as='ReLU')",
        "AHAF(size=(1,), init_as='SiLU')",
        "LEAF(size=(1,), init_as=('Swish', 3))",
    ]
    assert [type(m) for m in net["head"]] == [nn.ReLU, nn.SiLU]
    assert {k.name: k.reason for k in report.kept} == {
        "head.0": "rules['head.*'] is None",
        "head.1": "rules['head.*'] is None",
        "tail": "it matches no activation",
    }
    assert {r.name: r.difference for r in report.replaced}["body.1"] == pytest.approx(0.1)  # LeakyReLU's, at -10
    assert {r.name: r.difference for r in report.replaced}["body.3"] < 1e-15


def test_each_place_has_its_own():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(6, 6), act, nn.Sequential(nn.Linear(6, 6), act))
    replace_activations(model)
    assert isinstance(model[1], LEAF) and isinstance(model[2][1], LEAF) and model[1] is not model[2][1]
    block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    shared = nn.Sequential(block, block)
    assert len(replace_activations(shared).replaced) == 1 and shared[0] is shared[1]


def test_ahaf_becomes_leaf():
    ahaf = AHAF(size=(6,), init_as="SiLU", keep_float32=False, dtype=torch.float64)
    with torch.no_grad():
        ahaf.gamma.uniform_(-2, 2)
        ahaf.beta.uniform_(-2, 2)
    ahaf.beta.requires_grad_(False)
    model = nn.Sequential(ahaf, nn.Identity(), ahaf)
    x = X.double()
    before = model(x)
    report = replace_activations(model)
    assert [r.difference for r in report.replaced] == [0.0, 0.0]
    assert torch.equal(model(x), before) and model[0] is model[2]
    assert [p.requires_grad for p in model[0].parameters()] == [False, True, True, True]
    assert (model[0].size, model[0].keep_float32, model[0].p1.dtype) == ((6,), False, torch.float64)
    assert not replace_activations(nn.Sequential(LEAF(), nn.ReLU()), AHAF).kept


def not_constant(self, x):
    return F.gelu(self.fc1(x), approximate="tanh" if x.sum() > 0 else "none")


def assigning(self, x):
    self.last = F.relu(self.fc1(x))
    return self.last


def appending(self, x):
    self.values.append(x)
    return F.relu(x)


def counting(self, x):
    self.steps += 1
    return F.relu(x)


def counting_anew(self, x):
    self.steps = self.steps + 1
    return F.relu(x)


def counting_in_a_dict(self, x):
    self.table["calls"] = self.table["calls"] + 1
    return F.relu(x)


def changing_a_tensor(self, x):
    self.table["mean"].mul_(0.9)
    return F.relu(x)


def assigning_to_a_child(self, x):
    self.fc1.last = x
    return F.relu(x)


def counting_in_an_object(self, x):
    self.state.calls += 1
    return F.relu(x)


def counting_in_a_counter(self, x):
    self.state.seen["calls"] += 1
    return F.relu(x)


def appending_in_an_object(self, x):
    self.state.log.append(x)
    return F.relu(x)


def counting_in_a_child(self, x):
    self.norm.num_batches_tracked.add_(1)
    return F.relu(x)


def freezing_a_child(self, x):
    self.norm.eval()
    return F.relu(self.norm(x))


def asking_a_child(self, x):
    return F.dropout(F.relu(x), 0.5, self.norm.training)


def ordered(self, x):
    return collections.OrderedDict(out=F.relu(x))


def with_a_context(self, x):
    with contextlib.nullcontext():
        x = F.relu(x)
    return x


def with_a_context_in_a_function(self, x):
    return with_a_context(self, self.fc1(x))


def in_place(self, x):
    x = self.fc1(x)
    x.relu_()
    return x


def in_place_by_function(self, x):
    x = self.fc1(x)
    return F.silu(x, inplace=True) + x


def own_tensor(self, x):
    return F.relu(x) + torch.rand(6)


def python_random(self, x):
    return F.relu(x) if random.random() < 2 else x


def torch_random(self, x):
    return F.relu(x) if torch.rand(()) < 2 else x


def numpy_random(self, x):
    return F.relu(x) if numpy.random.rand() < 2 else x


def random_of_its_own(self, x):
    return F.relu(x) if torch.rand((), generator=self.generator) < 2 else x


def python_random_of_its_own(self, x):
    return F.relu(x) if self.python.random() < 2 else x


def numpy_random_of_its_own(self, x):
    return F.relu(x) if self.numpy.random() < 2 else x


def other_in_training(self, x):
    return F.relu(x) if self.training else torch.tanh(x)


def computed_argument(self, x):
    return F.leaky_relu(x, x.shape[0])


def without_gradients(self, x):
    with torch.no_grad():
        x = self.fc1(x)
    return F.relu(x)


def under_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(self.fc1(x))


def checkpointed(self, x):
    return torch.utils.checkpoint.checkpoint(lambda x: F.relu(self.fc1(x)), x, use_reentrant=False)


def asking_for_gradients(self, x):
    return F.relu(x) if torch.is_grad_enabled() else F.relu(self.fc1(x))


def asking_isinstance(self, x):
    return F.relu(x) if isinstance(x, torch.Tensor) else F.relu(x[0])


def asking_hasattr(self, x):
    return F.relu(x[0]) if hasattr(x, "tensors") else F.relu(x)


def asking_is_tensor(self, x):
    return F.relu(x) if torch.is_tensor(x) else F.relu(x[0])


#: Arguments of a fixed activation's constructor, and of its functions after the input.
ARGUMENTS = {
    nn.CELU: (2.0,),
    nn.ELU: (0.5,),
    nn.Hardshrink: (0.3,),
    nn.Hardtanh: (-0.5, 0.7),
    nn.LeakyReLU: (0.2,),
    nn.Softplus: (2.0, 10.0),
    nn.Softshrink: (0.3,),
    nn.Threshold: (0.5, -2.0),
}


@pytest.mark.parametrize("kind, call", [(kind, c) for kind, f in FIXED.items() for c in (*f.calls, *f.in_place)])
def test_table_of_calls(kind, call):
    """Each function and method computes what its module does, changes its input only if listed so, and is found."""
    arguments = ARGUMENTS.get(kind, ())

    def function(u):
        return getattr(u, call)(*arguments) if isinstance(call, str) else call(u, *arguments)

    u, fixed = X.clone(), kind(*arguments)
    torch.testing.assert_close(function(u), fixed(X), rtol=0, atol=0)
    assert is_in_place(call) != torch.equal(u, X)
    model = make_forward(lambda self, x: self.fc2(function(self.fc1(x))))
    (replaced,) = replace_activations(model, rules={kind: "Sigmoid"}).replaced
    torch.testing.assert_close(model(X), model.fc2(torch.sigmoid(model.fc1(X))))


def test_class_attribute_of_the_name():
    class Block(nn.Module):
        activation = None

        def __init__(self):
            super().__init__()
            self.activation = F.gelu

        def forward(self, x):
            return self.activation(x) + 1

    block = Block()
    report = replace_activations(nn.Sequential(block, nn.ReLU()))
    assert {r.name: r.old for r in report.replaced} == {"0.gelu": "gelu()", "1": "ReLU()"}
    assert block.activation is F.gelu and not report.kept


class Act(nn.Module):
    """A class of another library's for an activation."""

    def __init__(self, body=None, **attributes):
        super().__init__()
        self.body, self.calls = body, 0
        vars(self).update(attributes)

    def forward(self, x):
        return self.body(x)


class InPlaceSwish(nn.Module):
    def forward(self, x):
        return x.mul_(x.sigmoid())


class PythonGELU(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = self._gelu

    def _gelu(self, x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def forward(self, x):
        return self.act(x)


def new_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def hard_swish(x):
    return x * F.relu6(x + 3) / 6


class Gated(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(6, 6), nn.Linear(6, 6), act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@pytest.mark.parametrize(
    "act, form",
    [
        (Act(F.relu), "ReLU"),
        (Act(F.silu), "SiLU"),
        (InPlaceSwish(), "SiLU"),
        (PythonGELU(), "GELU"),
        (Act(new_gelu), "GELU"),
        (Act(quick_gelu), "GELU"),
        (Act(hard_swish), ("Swish", 1.05)),
    ],
)
def test_own_class_of_a_fixed_activation(act, form):
    """It is one place, also where its formula has another activation in it; and the result pickles."""
    model = Gated(act)
    report = replace_activations(model, example_inputs=X)
    (replaced,) = report.replaced
    assert (replaced.name, replaced.old, replaced.calls) == ("act", repr(act), 1) and not report.kept
    assert type(model.act) is LEAF and model.act.init_as == form
    assert replaced.difference < (1e-12 if vars(act).get("body") is quick_gelu else 0.13)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(X), model(X), rtol=0, atol=0)


def noisy(x):
    return F.relu(x) + torch.randn_like(x)


def clipped(x):
    return torch.clip(F.gelu(x), -20, 20)


def by_sum(x):
    return F.relu(x) if x.sum() < 1e9 else x


def flattening(x):
    return F.relu(x.reshape(-1))


def counting_calls(self, x):
    self.calls += 1
    return F.relu(x)


def counting_in_place(self, x):
    self.count += 1
    return F.relu(x)


def in_eval_mode(self, x):
    return x if self.training else F.relu(x)


def with_optional(self, x, scale=None):
    return F.relu(x)


class Bound(Act):
    def forward(self, x):
        return self.body(self, x)


@pytest.mark.parametrize(
    "act",
    [
        *(Act(body) for body in (noisy, clipped, by_sum, flattening)),
        *(Bound(body) for body in (counting_calls, in_eval_mode)),
        Bound(counting_in_place, count=torch.zeros(())),
        type("Optional", (Act,), {"forward": with_optional})(),
    ],
)
def test_class_that_is_no_fixed_activation(act):
    before = dict(vars(act))
    assert fixed_equal_to(act) is None and vars(act) == before and before.get("count", 0) == 0


def test_own_class_is_not_called_with_made_up_numbers():
    seen = []

    def noting(x):
        seen.append(type(x))
        return F.relu(x)

    assert isinstance(fixed_equal_to(Act(noting)), nn.ReLU) and torch.Tensor not in seen


def test_own_class_of_a_fixed_activation_and_rules():
    def converted(rules, **options):
        model = Gated(Act(new_gelu))
        report = replace_activations(model, rules=rules, example_inputs=X, **options)
        return model.act, [k.reason for k in report.kept]

    act, _ = converted({nn.GELU: "SiLU"}, granularity="channel")
    assert act.init_as == "SiLU" and act.size == (6,)
    assert converted({Act: "Tanh", nn.GELU: "SiLU"})[0].init_as == "Tanh"
    assert converted({"act": "Identity"})[0].init_as == "Identity"
    with pytest.warns(UserWarning, match="nothing replaced"):
        act, reasons = converted({Act: None})
    assert type(act) is Act and any("is None" in reason for reason in reasons)


class Flow(Act):
    def inverse(self, y):
        return torch.atanh(y)


class Doubled(Act):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Watched(Act):
    """Its model reads an attribute of it."""


class Watching(Gated):
    def forward(self, x):
        return super().forward(x) * self.act.gain


def hooked(act):
    act.register_forward_hook(lambda module, args, output: 2 * output)
    return act


@pytest.mark.parametrize(
    "model",
    [
        Gated(Act(lambda x: F.relu(x - x.mean(0, keepdim=True)))),
        Gated(Act(lambda x: F.relu(x - x.median()))),
        Gated(Act(lambda x: F.relu(x).clamp(max=6e4))),
        Gated(Act(lambda x: x + (F.relu(x) - x).detach())),
        Gated(Act(lambda x: F.relu(x.detach()))),
        Gated(Doubled(F.relu)),
        Gated(hooked(Act(F.relu))),
        Watching(Watched(F.relu, gain=3.0)),
    ],
)
def test_own_class_that_does_more(model):
    """What its forward calls is replaced instead."""

    def output_and_gradient():
        model.zero_grad()
        y = model(X)
        y.sum().backward()
        return y.detach(), model.fc1.weight.grad

    expected, expected_gradient = output_and_gradient()
    (replaced,) = replace_activations(model, example_inputs=X).replaced
    assert replaced.name.startswith("act.")
    y, gradient = output_and_gradient()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    assert (gradient is None) == (expected_gradient is None)
    if gradient is not None:
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_own_class_of_another_dtype_and_with_methods():
    half = nn.Sequential(nn.Linear(6, 6, dtype=torch.bfloat16), Act(lambda x: F.gelu(x.float())), nn.Linear(6, 6))
    replace_activations(half)
    assert half(X.bfloat16()).dtype == torch.float32
    model = Gated(Flow(torch.tanh))
    assert [r.name for r in replace_activations(model).replaced] == ["act.body"]
    torch.testing.assert_close(model.act.inverse(torch.tanh(X / 9)), X / 9, rtol=1e-4, atol=1e-4)


def test_own_class_called_by_keyword():
    model = make_forward(lambda self, x: self.fc2(self.act(x=self.fc1(x)) if x.sum() < 1e9 else x))
    model.act = Act(F.relu)
    report = replace_activations(model, example_inputs=X)
    assert [r.name for r in report.replaced] == ["act.body"] and report.output_difference < 1e-5


def test_own_class_that_cannot_be_copied():
    """A lock; and the way back to the model, of which each copy would hold another."""
    model = nn.Sequential(*(Act(F.relu, lock=threading.Lock()) for _ in range(12)))
    for act in model:
        act.owner = [model]
    assert len(replace_activations(model).replaced) == 12 and all(type(m) is LEAF for m in model)


@pytest.mark.parametrize("act", [nn.SiLU(), Act(F.silu)])
def test_activation_that_is_compiled_alone(act):
    """The compiled call would go on with the activation, and LEAF be never called."""
    model = nn.Sequential(nn.Linear(6, 6), torch.compile(act, backend="eager"))
    expected = model(X)
    with pytest.warns(UserWarning) if type(act) is nn.SiLU else contextlib.nullcontext():
        replace_activations(model)
    torch.testing.assert_close(model(X), expected)
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class AttributeDict(dict):
    __getattr__ = dict.__getitem__


SETTINGS = AttributeDict(scale=2.0)


def test_forward_that_names_anything():
    def later(self, x):
        return self.fc1(x) * SETTINGS.scale if x.sum() > 0 else unbound

    model = nn.Sequential(make_forward(lambda self, x: self.fc1(x) * SETTINGS.scale), make_forward(later), nn.ReLU())
    assert [r.name for r in replace_activations(model).replaced] == ["2"]
    unbound = None  # noqa: F841


class OfFloat32(nn.Module):
    def forward(self, x):
        assert x.dtype == torch.float32
        return x


class OfChannels(nn.Module):
    def forward(self, x):
        return x * x.size(1)


@pytest.mark.parametrize("kind", [OfFloat32, OfChannels])
def test_own_activation_of_other_inputs(kind):
    """It is no error that such an activation does not take the input that its difference is measured with."""
    (replaced,) = replace_activations(nn.Sequential(kind()), rules={kind: "SiLU"}).replaced
    assert replaced.difference is None


def asking_for_autocast(self, x):
    return F.relu(x) if torch.is_autocast_enabled() else F.relu(self.fc1(x))


def asking_for_autocast_on_the_cpu(self, x):
    return F.relu(x) if torch.is_autocast_enabled("cpu") else F.relu(self.fc1(x))


def asking_for_inference_mode(self, x):
    return F.relu(x) if torch.is_inference_mode_enabled() else F.relu(self.fc1(x))


def asking_for_a_required_argument(self, x, mask):
    return F.relu(x) if mask is None else F.relu(x) * mask


def asking_for_none_in_place_of_a_default(self, x, scale=2.0):
    return F.relu(x) if scale is None else F.relu(x) * scale


def asking_for_true(self, x, twice=False):
    return F.relu(x) * 2 if twice is True else F.relu(x)


def asking_for_two(self, x, mask, bias):
    return F.relu(x) if mask is None and bias is None else F.relu(x) + mask + bias


def asking_for_keywords(self, x, **options):
    return F.relu(x) if options.get("scale") is None else F.relu(x) * options["scale"]


@pytest.mark.parametrize(
    "body, reason",
    [
        (asking_for_autocast, "torch.fx: it does other things under autocast"),
        (asking_for_inference_mode, "torch.fx: it does other things in inference mode"),
        (without_gradients, "torch.fx: it changes the grad mode or autocast within"),
        (torch.no_grad()(lambda self, x: F.relu(x)), "torch.fx: it changes the grad mode"),
        (under_autocast, "torch.fx: it changes the grad mode or autocast within"),
        (checkpointed, "torch.fx: it uses activation checkpointing"),
        (asking_for_gradients, "torch.fx: it does other things without gradients"),
        (asking_isinstance, "torch.fx: it asks for the type of an input"),
        (asking_hasattr, "torch.fx: it asks for the type of an input"),
        (asking_is_tensor, "torch.fx: it asks for the type of an input"),
        (not_constant, "torch.fx: symbolically traced variables cannot be used as inputs to control flow"),
        (assigning, "torch.fx: it changes its attributes"),
        (appending, "torch.fx: it changes its attributes"),
        (counting, "torch.fx: it changes a tensor in place"),
        (counting_anew, "torch.fx: it changes its attributes"),
        (counting_in_a_dict, "torch.fx: it changes its attributes"),
        (changing_a_tensor, "torch.fx: it changes a tensor in place"),
        (assigning_to_a_child, "torch.fx: it changes its attributes"),
        (counting_in_an_object, "torch.fx: it changes its attributes"),
        (counting_in_a_counter, "torch.fx: it changes its attributes"),
        (appending_in_an_object, "torch.fx: it changes its attributes"),
        (counting_in_a_child, "torch.fx: it changes a tensor in place"),
        (freezing_a_child, "torch.fx: it changes the mode of a child"),
        (asking_a_child, "torch.fx: it asks whether its children are in train mode"),
        (ordered, "torch.fx: it makes an object of OrderedDict"),
        (with_a_context, "torch.fx: it has a with statement"),
        (with_a_context_in_a_function, "torch.fx: it has a with statement"),
        (own_tensor, "torch.fx: it changes its attributes, or makes a tensor of its own"),
        (in_place, "it works in place, and what it changes is used again"),
        (in_place_by_function, "it works in place, and what it changes is used again"),
        (python_random, "torch.fx: it draws random numbers"),
        (torch_random, "torch.fx: it draws random numbers"),
        (numpy_random, "torch.fx: it draws random numbers"),
        (random_of_its_own, "torch.fx: it draws random numbers"),
        (python_random_of_its_own, "torch.fx: it draws random numbers"),
        (numpy_random_of_its_own, "torch.fx: it draws random numbers"),
        (other_in_training, "other activations in train than in eval mode"),
        (computed_argument, "its arguments are computed"),
        (lambda self, x: torch.tanh(x, out=None), "its arguments are not those of its module"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_calls_kept(body, reason, grad):
    """A forward that its trace would not repeat stays, and the report says why."""
    model = make_forward(body)
    kind, attributes = type(model), dict(vars(model))
    table, state = copy.deepcopy(model.table), copy.deepcopy(model.state_dict())
    children, generator = [dict(vars(m)) for m in model.children()], model.generator.get_state()
    with pytest.warns(UserWarning, match="nothing replaced"), torch.set_grad_enabled(grad):
        report = replace_activations(model)
    (kept,) = report.kept
    assert reason in kept.reason and not report.replaced
    assert type(model) is kind and vars(model) == attributes and model.values == []
    assert model.table == table
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [vars(m) for m in model.children()] == children
    assert model.state == SimpleNamespace(calls=0, log=[], seen={"calls": 5})
    assert torch.equal(model.generator.get_state(), generator)


def test_parametrized_module():
    model = make_forward(lambda self, x: F.relu(self.fc1(x)))
    model.weight = nn.Parameter(torch.ones(3, 3))
    nn.utils.parametrizations.weight_norm(model)
    with pytest.warns(UserWarning, match="nothing replaced"):
        (kept,) = replace_activations(model).kept
    assert "it takes its parametrizations afterwards" in kept.reason


def test_class_that_takes_no_subclass():
    class Final(nn.Module):
        def __init_subclass__(cls):
            raise TypeError("none of mine")

        def forward(self, x):
            return F.relu(x) + x

    model = nn.Sequential(Final(), nn.SiLU())
    report = replace_activations(model, example_inputs=X)
    assert [r.name for r in report.replaced] == ["1"]
    assert [(k.name, k.reason) for k in report.kept] == [("0.relu", "its class takes no subclass: none of mine")]
    assert type(model[0]) is Final and not model[0]._modules


@pytest.mark.parametrize("inputs", [None, X])
@pytest.mark.parametrize("traceable", [True, False])
def test_function_with_more_arguments(inputs, traceable):
    """A function in an attribute, called with more than its input: a trace shows that, and its call is replaced;
    without a trace, the run shows it."""

    def forward(self, x):
        if not traceable and x.sum() > 1e9:
            return x
        return self.act(self.fc1(x), inplace=True)

    model = make_forward(forward)
    model.act = F.relu
    if inputs is None and not traceable:
        assert [r.name for r in replace_activations(model).replaced] == ["act"]  # nothing shows it
        return
    with contextlib.nullcontext() if traceable else pytest.warns(UserWarning, match="nothing replaced"):
        report = replace_activations(model, example_inputs=inputs)
    reason = "it is called with more than its input, or by keyword"
    assert (("act", reason) in [(k.name, k.reason) for k in report.kept]) == (not traceable)
    assert model.act is F.relu and [r.name for r in report.replaced] == ["relu"] * traceable
    torch.testing.assert_close(model(X), F.relu(model.fc1(X)))


class Scaled(nn.Module):
    def forward(self, x, scale=1.0):
        return F.silu(x) * scale


@pytest.mark.parametrize("inputs, compiled", [(None, False), (X, False), (X, True)])
@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: self.acts[0](self.fc1(x), 2.0),
        lambda self, x: self.acts[0](x=self.fc1(x)),
        lambda self, x: self.acts[1].act(self.fc1(x), scale=2.0),
    ],
)
def test_module_with_more_arguments(body, inputs, compiled):
    """Wherever the activation is in the module; all such places are found in one run."""
    runs = []

    def forward(self, x):
        return body(self, x)

    model = make_forward(forward)
    model.acts = nn.ModuleList([Scaled(), nn.Module()])
    model.acts[1].act = Scaled()
    whole = nn.Sequential(*(copy.deepcopy(model) for _ in range(3)), nn.ReLU())
    if compiled:
        whole[0].compile(backend="eager")
    whole.register_forward_hook(lambda *args: runs.append(1))
    expected = whole(X)
    report = replace_activations(whole, rules={Scaled: "SiLU"}, example_inputs=inputs)
    kept = {k.name for k in report.kept if k.reason == "it is called with more than its input, or by keyword"}
    assert len(kept) == 3 and "3" in [r.name for r in report.replaced]
    assert len(runs) <= 8
    torch.testing.assert_close(whole(X), expected)


def test_child_with_a_with_statement():
    """It does not matter, since the graph calls the child as it is."""

    class Timed(nn.Linear):
        def __call__(self, x):
            with contextlib.nullcontext():
                return super().__call__(x)

    model = make_forward(lambda self, x: F.relu(self.timed(x)))
    model.timed = Timed(6, 6)
    assert [r.name for r in replace_activations(model, example_inputs=X).replaced] == ["relu"]


def test_modes():
    """Children whose mode is fixed, or that have none; classes that prepare for eval mode in train()."""

    class Frozen(nn.BatchNorm1d):
        training = property(lambda self: False, lambda self, value: None)

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.fused = None

        def train(self, mode=True):
            self.fused = None if mode else 1.0
            return super().train(mode)

        def forward(self, x):
            return x if self.training else x * self.fused

    model = make_forward(lambda self, x: F.relu(self.fused(self.frozen(self.script(x)))))
    model.frozen, model.fused = Frozen(6), Fused()
    model.script = torch.jit.freeze(torch.jit.script(nn.Linear(6, 6)).eval())
    report = replace_activations(model, example_inputs=X)
    assert [r.name for r in report.replaced] == ["relu"]
    assert model.training and model.fused.fused is None


def test_trace_that_example_inputs_refute():
    """What no trace sees, example inputs show: that module stays as it was, and others are converted."""

    class Asking(nn.Module):
        def forward(self, x):
            return F.relu(x) + 1 if type(x) is torch.Tensor else F.relu(x) * 100

    class Plain(nn.Module):
        def forward(self, x):
            return F.silu(x) + 1

    model = nn.Sequential(Plain(), Asking(), Plain())
    state = dict(vars(model[1]))
    report = replace_activations(model, example_inputs=X)
    assert [r.name for r in report.replaced] == ["0.silu", "2.silu"] and report.output_difference < 1e-5
    assert [(k.name, k.reason) for k in report.kept] == [
        ("1", "its trace by torch.fx computes something else from example_inputs")
    ]
    assert type(model[1]) is Asking and vars(model[1]) == state and not model[1]._modules


def test_trace_that_example_inputs_do_not_refute():
    """Differences with another cause do not discredit a trace: a fast path that is switched off, a module that never
    repeats itself, one that iterates over its children."""

    class Plain(nn.Module):
        def forward(self, x):
            return F.silu(x) + 1

    class Drawing(nn.Module):
        def forward(self, x):
            return x * random.random()

    class Iterating(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = layer(x)
            return F.silu(x)

    class Asking(nn.Module):
        def forward(self, x):
            y = F.relu(x) if type(x) is torch.Tensor else F.relu(x) * 100
            return y.masked_fill(y > 3, -torch.inf)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(6, 2, 12, 0.0, F.relu, batch_first=True)
            self.encoder, self.plain = nn.TransformerEncoder(layer, 1), Plain()

        def forward(self, x):
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[:, -3:] = True
            return self.plain(self.encoder(x, src_key_padding_mask=padding))

    def replaced(model, inputs=X):
        return [r.name for r in replace_activations(model, example_inputs=inputs).replaced]

    assert replaced(nn.Sequential(Plain(), Drawing())) == ["0.silu"]
    assert "plain.silu" in replaced(Encoder(), X[None])
    layers = [Iterating(nn.Linear(6, 6)) for _ in range(3)]
    assert replaced(nn.Sequential(*layers, Asking())) == ["0.silu", "1.silu", "2.silu"]


def under_raising(self, x, mask):
    if mask is None:
        raise RuntimeError("a mask, please")
    return F.relu(x) * mask


def test_none_that_a_forward_refuses():
    assert replace_activations(type("Raising", (nn.Module,), {"forward": under_raising})()).replaced


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")])
@pytest.mark.parametrize("body", [asking_for_autocast_on_the_cpu, asking_for_inference_mode, asking_for_gradients])
def test_modes_of_the_caller(mode, body):
    """Whatever mode is on around the call, a forward that asks for a mode is kept."""
    model = make_forward(body)
    with mode(), pytest.warns(UserWarning, match="nothing replaced"):
        replace_activations(model)


@pytest.mark.parametrize("inside", [False, True])
def test_graph_module(inside):
    """Its modules are replaced; calls in its graph, from which copies of it are made, are not."""
    traced = torch.fx.symbolic_trace(nn.Sequential(make_forward(lambda self, x: F.relu(self.fc1(x))), nn.SiLU()))
    model = nn.Sequential(traced) if inside else traced
    expected = model(X)
    report = replace_activations(model, example_inputs=X)
    assert [r.old for r in report.replaced] == ["SiLU()"]
    assert [(k.old, k.name) for k in report.kept] == [("a GraphModule", "0" if inside else "the model")]
    torch.testing.assert_close(copy.deepcopy(model)(X), expected)


def test_forward_of_the_instance():
    model = make_forward(lambda self, x: F.relu(x))
    model.forward = lambda x: torch.tanh(x)
    with pytest.warns(UserWarning, match="nothing replaced"):
        (kept,) = replace_activations(model).kept
    assert "its forward is not its class's" in kept.reason and torch.equal(model(X), torch.tanh(X))


def hooked():
    act = nn.ReLU()
    act.register_forward_hook(lambda *args: None)
    return act


class OwnReLU(nn.ReLU):
    pass


@pytest.mark.parametrize(
    "make, reason",
    [
        (nn.LeakyReLU, "no form is near it; rules={LeakyReLU: form} would name one"),
        (nn.PReLU, "no form is near it"),
        (lambda: nn.LSTM(6, 6), "inside torch's own recurrent step"),
        (lambda: nn.GRUCell(6, 6), "inside torch's own recurrent step"),
        (lambda: nn.RNN(6, 6, nonlinearity="relu"), "inside torch's own recurrent step"),
        (hooked, "it has hooks, which would be lost"),
        (OwnReLU, "a class of its own; rules={OwnReLU: form} would name one"),
        (lambda: torch.jit.script(nn.Sequential(nn.ReLU())), "TorchScript cannot be changed"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:`torch.jit.script")
def test_modules_kept(make, reason):
    model = nn.Sequential(make())
    child = model[0]
    with pytest.warns(UserWarning, match="nothing replaced"):
        report = replace_activations(model)
    (kept,) = report.kept
    assert kept.name == "0" and reason in kept.reason and model[0] is child and reason in str(report)


def test_recurrent_layers_with_leaf():
    """They keep their own LEAFs."""
    model = nn.ModuleDict({"rnn": LeafLSTM(3, 4), "cell": LeafGRUCell(3, 4), "act": nn.SiLU()})
    report = replace_activations(model)
    assert [r.name for r in report.replaced] == ["act"] and not report.kept


def test_kept_by_size():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never, self.flat, self.whole = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            with contextlib.nullcontext():  # not traced, so the calls of a module are not places each
                return (
                    self.twice(x).sum()
                    + self.twice(x[:, :3]).sum()
                    + self.flat(x.sum(1)).sum()
                    + self.whole(x.long()).sum()
                )

    model = Net()
    children = dict(model._modules)
    with pytest.warns(UserWarning, match="nothing replaced"):
        report = replace_activations(model, granularity="element", example_inputs=X)
    assert dict(model._modules) == children
    reasons = {k.name: k.reason for k in report.kept}
    assert "parameters of several sizes, [(3,), (6,)]" in reasons["twice"]
    assert "it was not called" in reasons["never"]
    assert "shape (10,) has no dimension for granularity 'element'" in reasons["flat"]
    assert "torch.int64" in reasons["whole"]


class Bottleneck(nn.Module):
    """Like torchvision's: one activation module for three calls."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide, self.relu = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.narrow(x))
        y = self.relu(y.mul(2))
        return self.relu(self.wide(y) + x)


@pytest.mark.parametrize("rules", [None, {"*.relu": None}, {nn.ReLU: "SiLU"}])
def test_one_module_of_several_sizes(rules):
    """Each call gets parameters of its own, if the forward can be traced."""
    model, x = nn.Sequential(Bottleneck(), nn.SiLU()).eval(), torch.randn(2, 8, 5, 5)
    before = model(x)
    report = replace_activations(model, granularity="channel", example_inputs=x, rules=rules)
    names = {r.name: (r.old, getattr(model.get_submodule(r.name), "size", None)) for r in report.replaced}
    assert names.pop("1") == ("SiLU()", (8, 1, 1))
    if rules == {"*.relu": None}:
        assert not names and [k.name for k in report.kept] == ["0.relu"]
        return
    old = "ReLU(inplace=True)"
    assert sorted(names.values()) == [(old, (4, 1, 1)), (old, (4, 1, 1)), (old, (8, 1, 1))]
    assert not report.kept and {r.calls for r in report.replaced} == {1}
    if rules is None:
        torch.testing.assert_close(model(x), before, rtol=0, atol=2e-5)
    assert isinstance(model[0], Bottleneck) and set(copy.deepcopy(model).state_dict()) == set(model.state_dict())
    one = nn.Sequential(Bottleneck(), nn.SiLU())
    shared = replace_activations(one, example_inputs=x)  # per layer: all calls share one set of parameters
    assert {r.name: r.calls for r in shared.replaced} == {"0.relu": 3, "1": 1} and "for 3 calls" in str(shared)
    assert type(one[0]) is Bottleneck


def test_gpus_of_no_use_to_the_model_are_not_started(monkeypatch):
    """As torch.random.fork_rng does by itself."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail(f"{device} was started"))
    assert replace_activations(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), example_inputs=X).replaced


def test_example_inputs_are_not_changed():
    """A model that changes them in place runs on copies, so that the outputs are still seen to differ."""
    model = make_forward(lambda self, x: x + self.fc1(self.act(x)))
    model.act = nn.ReLU(inplace=True)
    x = X.clone()
    report = replace_activations(model, example_inputs=x)
    assert torch.equal(x, X) and report.output_difference > 0.1
    assert report.largest_output > 1 and "of outputs up to" in str(report)


def test_partial_and_unknown_functions():
    layer = nn.TransformerEncoderLayer(6, 2, 12, activation=functools.partial(F.gelu, approximate="tanh"))
    (replaced,) = replace_activations(layer, example_inputs=X[None]).replaced
    assert replaced.old == "function gelu" and isinstance(layer.activation, LEAF)
    unknown = nn.TransformerEncoderLayer(6, 2, 12, activation=lambda x: F.gelu(x))
    with pytest.warns(UserWarning, match="activation: function <lambda>: no known activation"):
        replace_activations(unknown)


@pytest.mark.parametrize(
    "model, reason", [(nn.ReLU(), "it is the model itself"), (nn.LSTM(3, 4), "leaf_cuda.nn has LSTM and GRU")]
)
def test_model_that_is_an_activation(model, reason):
    with pytest.warns(UserWarning, match=reason):
        replace_activations(model)


class Head(nn.Module):
    """A module that is itself called with several sizes."""

    def __init__(self, body):
        super().__init__()
        self.act, self.body = nn.ReLU(), body

    def forward(self, x):
        return self.body(self, x)


@pytest.mark.parametrize(
    "body, kept", [(lambda self, x: F.relu(x) * 2, "0.relu"), (lambda self, x: self.act(self.act(x)), "0.act_leaf1")]
)
def test_calls_of_several_sizes(body, kept):
    """A call that gets inputs of several sizes is kept, since it is a single place."""

    class Pyramid(nn.Sequential):
        def forward(self, x):
            return self[0](x).sum() + self[0](x[:, :3]).sum() + self[1](x).sum()

    report = replace_activations(Pyramid(Head(body), nn.SiLU()), granularity="element", example_inputs=X)
    assert [r.name for r in report.replaced] == ["1"]
    assert "several sizes" in {k.name: k.reason for k in report.kept}[kept]
    assert not any("other modules" in k.reason for k in report.kept)


def test_module_called_by_another_too():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Head(lambda self, x: self.act(x).sum() + self.act(x[:, :2]).sum())

        def forward(self, x):
            return self.head(x) + self.head.act(x).sum()

    report = replace_activations(Outer(), granularity="element", example_inputs=X)
    assert [r.name for r in report.replaced] == ["head.act_leaf1", "head.act_1"]
    assert [k.name for k in report.kept] == ["head.act"] and "its calls by other modules" in report.kept[0].reason
    rules = {"head.act_1": None}  # by the name in the report
    report = replace_activations(Outer(), granularity="element", example_inputs=X, rules=rules)
    assert [r.name for r in report.replaced] == ["head.act_leaf1"]


class Named(dict):
    pass


@pytest.mark.parametrize("make", [dict, Named, collections.UserDict])
def test_inputs_by_name_are_copied(make):
    """The copies require gradients as the inputs do: a model may differentiate with respect to its input."""

    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.SiLU()

        def forward(self, x):
            with torch.enable_grad():
                (force,) = torch.autograd.grad(self.act(x).sum(), x)
            x.detach().add_(1)
            return force

    x = X.clone().requires_grad_()
    report = replace_activations(Energy(), example_inputs=make(x=x))
    assert torch.equal(x, X) and len(report.replaced) == 1 and report.output_difference < 1e-6


def test_forwards_without_activations_are_not_reported():
    def calls_a_helper(self, x):
        return helper(self, x) if x.sum() > 0 else x

    def helper(self, x):
        return F.silu(x)

    softly = F.softplus

    class Child(Head):
        act = staticmethod(torch.tanh)

        def __init__(self):
            nn.Module.__init__(self)

        def forward(self, x):
            return self.act(x) if x.sum() > 0 else x

    class Grandchild(Child):
        def forward(self, x):
            return super().forward(x)

    if_positive = [
        (lambda self, x: x if x.sum() > 0 else -x, False),
        (calls_a_helper, True),
        (lambda self, x: softly(x) if x.sum() > 0 else x, True),
        (lambda self, x: nn.Mish()(x) if x.sum() > 0 else x, True),
        (lambda self, x: torch.special.expit(x) if x.sum() > 0 else x, True),
        (lambda self, x: F.logsigmoid(x) if x.sum() > 0 else x, True),
        (lambda self, x: x.tanh() if x.sum() > 0 else x, True),
    ]
    modules = [(make_forward(body), reported) for body, reported in if_positive]
    for module, reported in [*modules, (Child(), True), (Grandchild(), True)]:
        model = nn.Sequential(module, nn.ReLU())
        report = replace_activations(model)
        assert [r.name for r in report.replaced] == ["1"]
        assert [k.name for k in report.kept] == ["0"] * reported


def test_kept_place_is_as_it_was():
    """If nothing in them is replaced, a transformer layer keeps its fast path, and a module its class."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(6, 2, 12, 0.0, batch_first=True)

        def forward(self, x):
            return F.silu(self.layer(x).sum() + self.layer(x[:, :3]).sum())

    model = Twice().eval()
    state = dict(vars(model.layer))
    with pytest.warns(UserWarning, match="nothing replaced"):
        report = replace_activations(model, granularity="element", example_inputs=X[None])
    assert {k.name for k in report.kept} == {"layer.activation", "silu"}
    assert type(model) is Twice and vars(model.layer) == state


def test_not_called():
    """A replaced module that is also in a list, say, is still called there in place of the new one."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.out = nn.ReLU(), nn.SiLU()
            self.steps = [self.act]

        def forward(self, x):
            return self.out(self.steps[0](x))

    report = replace_activations(Listed(), example_inputs=X)
    assert [(r.name, r.calls) for r in report.replaced] == [("act", 0), ("out", 1)]
    assert "act: ReLU() -> LEAF(size=(1,), init_as='ReLU'), within 4.2e-06, not called" in str(report)


def test_ahaf_has_no_tanh():
    with pytest.warns(UserWarning, match="nothing replaced"):
        (kept,) = replace_activations(nn.Sequential(nn.Tanh()), AHAF).kept
    assert "no form of AHAF" in kept.reason


class Small(nn.Module):
    """A call, a function in an attribute, a shared module, and dropout by self.training."""

    def __init__(self):
        super().__init__()
        act = nn.ReLU(inplace=True)
        self.fc = nn.Sequential(nn.Linear(6, 6), act, nn.Linear(6, 6), act)
        self.act = F.tanh
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)

    def forward(self, x, scale: float = 2.0):
        x = self.act(self.fc(x))
        x = self.encoder(x[None])[0]
        return scale * F.dropout(F.silu(x), 0.5, self.training)


def test_train_and_eval_mode():
    model = Small()
    replace_activations(model)
    model.train()
    assert (model(X) == 0).any()
    model.eval()
    assert not (model(X) == 0).any()
    torch.testing.assert_close(model(X, scale=4.0), 2 * model(X))


def test_unchanged_after_an_error():
    """At every step that can fail: the run before, the run that finds the sizes, the creation of a LEAF."""
    torch.manual_seed(0)
    original = Small().eval()
    expected = original(X)
    for calls in range(3):
        model = copy.deepcopy(original)
        attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
        children = {name: dict(m._modules) for name, m in model.named_modules()}
        count = iter(range(calls))

        def fail(module, args):
            if next(count, None) is None:
                raise ArithmeticError("planted")

        handle = model.encoder.register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError, match="planted"):
            replace_activations(model, granularity="channel", example_inputs=X)
        handle.remove()
        assert type(model) is Small and torch.equal(model(X), expected)
        assert {name: dict(vars(m)) for name, m in model.named_modules()} == attributes
        assert {name: dict(m._modules) for name, m in model.named_modules()} == children
    with pytest.raises(ValueError, match="example_inputs is None; granularity 'element', of encoder.activation"):
        replace_activations(model, rules={"encoder.*": {"granularity": "element"}})
    assert type(model) is Small and torch.equal(model(X), expected) and model.act is F.tanh


def test_copies_and_state():
    torch.manual_seed(0)
    original = Small().eval()
    model = copy.deepcopy(original)
    replace_activations(model)
    assert isinstance(model, Small) and type(model).__name__ == "Small"
    assert not any(module.training for module in model.modules())
    clone = copy.deepcopy(model)
    with torch.no_grad():
        model.silu.p1 += 1
    assert not torch.equal(clone(X), model(X))
    again = copy.deepcopy(original)
    replace_activations(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), model(X))
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(model)


def test_compile():
    model = make_forward(lambda self, x: F.dropout(self.fc2(F.silu(self.fc1(x))), 0.5, self.training))
    replace_activations(model)
    compiled = torch.compile(model, fullgraph=True)
    model.eval()
    torch.testing.assert_close(compiled(X), model(X))
    model.train()
    assert (compiled(X) == 0).any()


def test_device_and_dtype():
    def converted(model):
        replace_activations(model)
        return [(p.device.type, p.dtype) for m in model.modules() if isinstance(m, LEAF) for p in (m.p1,)]

    def network(dtype):
        return nn.Sequential(nn.ReLU(), nn.Linear(3, 3, device="meta"), nn.Sequential(nn.Linear(3, 3), nn.Tanh())).to(
            dtype
        )

    assert converted(network(torch.float64)) == [("meta", torch.float64), ("cpu", torch.float64)]
    assert converted(network(torch.bfloat16)) == [("meta", torch.float32), ("cpu", torch.float32)]
    assert converted(nn.Sequential(nn.ReLU())) == [("cpu", torch.float32)]
    model = nn.Sequential(nn.ReLU())
    replace_activations(model, example_inputs=X.double())
    assert model[0].p1.dtype == torch.float64


def test_example_inputs():
    """A tensor, a tuple, a dict; batch normalisation's statistics and the random state stay as they were."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.BatchNorm1d(6), nn.SiLU()

        def forward(self, x, *, y=None):
            return {"out": [self.act(self.norm(x)), self.act(x if y is None else y) + torch.rand(())]}

    for inputs in (X, (X,), {"x": X, "y": X}):
        model = Net()
        state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        report = replace_activations(model, granularity="channel", example_inputs=inputs)
        assert report.output_difference < 1e-6 and model.act.size == (6,)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
        assert torch.equal(generator, torch.get_rng_state())


class OwnSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("one", torch.ones(()))
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return x * self.sigmoid(self.one * x)


@pytest.mark.parametrize("form", [None, "SiLU"])
def test_inside_of_an_own_activation(form):
    model = nn.Sequential(nn.Linear(6, 6), OwnSwish(), nn.ReLU())
    report = replace_activations(model, rules={OwnSwish: form}, example_inputs=X)
    assert [r.name for r in report.replaced] == (["1", "2"] if form else ["2"])
    assert isinstance(model[1], LEAF if form else OwnSwish) and report.output_difference < 1e-5


def test_child_with_the_name_of_a_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

        def forward(self, x):
            return self.relu(F.relu(x))

    model = Net()
    assert len(replace_activations(model).replaced) == 2 and isinstance(model.relu[1], LEAF)


def test_encoder_with_a_padding_mask():
    """Its fast path makes nested tensors, which LEAF does not take."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    inputs = {"src": torch.randn(3, 5, 8), "src_key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}
    inputs["src_key_padding_mask"][1, 3:] = True
    with torch.no_grad():
        expected = model(**inputs)
        report = replace_activations(model)
        result = model(**inputs)
    assert len(report.replaced) == 2
    kept = ~inputs["src_key_padding_mask"]
    torch.testing.assert_close(result[kept], expected[kept])
    original = nn.TransformerEncoder(layer, 2)
    with pytest.raises(ValueError, match="example_inputs is None"):
        replace_activations(original, granularity="element")
    assert original.use_nested_tensor


def test_differences_that_are_no_number():
    minus_infinity = torch.tensor([[0.0, -float("inf")]])
    report = replace_activations(nn.Sequential(nn.Sigmoid()), example_inputs=minus_infinity)
    assert math.isnan(report.output_difference)
    assert replace_activations(nn.Sequential(nn.ReLU()), example_inputs=torch.empty(0, 3)).output_difference == 0

    class Wrapping(nn.Sequential):
        def forward(self, x):
            return object()

    assert replace_activations(Wrapping(nn.ReLU()), example_inputs=X).output_difference is None


@pytest.mark.parametrize(
    "of", [Tensor.to_sparse, lambda y: torch.fft.fft(y).conj(), lambda y: torch.nested.as_nested_tensor(list(y))]
)
def test_differences_of_other_tensors(of):
    """Sparse, complex (whose imaginary part counts, too) and nested tensors."""

    class Net(nn.Sequential):
        def forward(self, x):
            return of(super().forward(x))

    report = replace_activations(Net(nn.Hardswish()), example_inputs=X)
    assert 0.05 < report.output_difference < 1


def test_on_the_meta_device():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), OwnSwish())
    with torch.device("meta"):
        report = replace_activations(
            model.to("meta"), granularity="channel", rules={OwnSwish: "SiLU"}, example_inputs=torch.empty(2, 6)
        )
    assert [(r.name, r.difference is None) for r in report.replaced] == [("1", False), ("2", True)]
    assert report.output_difference is None and model[1].p1.shape == (6,)


def test_where_parameters_are_registered_on_meta(monkeypatch):
    """As in accelerate's init_empty_weights, which moves each parameter as it is registered."""

    def register(self, name, p):
        register_parameter(self, name, p if p is None else nn.Parameter(p.to("meta")))

    register_parameter = nn.Module.register_parameter
    monkeypatch.setattr(nn.Module, "register_parameter", register)
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4), nn.GELU())
    differences = [r.difference for r in replace_activations(model).replaced]
    assert differences[0] < EXACT["SiLU"] and differences[1] < NEAR["GELU"]
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_in_place_activation_is_seen_in_the_output():
    """An input that was changed in place and is used again: the output changes, and the report says so."""
    act = nn.ReLU(inplace=True)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = act

        def forward(self, x):
            x = x + 0
            return self.act(x) + x

    assert replace_activations(Residual(), example_inputs=X).output_difference == pytest.approx(4)


def test_freeze():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="model has no LEAF or AHAF"):
        freeze_weights(model)
    replace_activations(model)
    frozen = freeze_weights(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["1.p1", "1.p2", "1.p3", "1.p4"]
    assert [tuple(p.shape) for p in frozen] == [(6, 6), (6, 6), (6,)]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"model": 3}, TypeError, "model is of type int"),
        ({"kind": nn.ReLU}, TypeError, "kind is <class.*; it takes LEAF or AHAF"),
        ({"kind": CellLEAF}, TypeError, "kind is <class.*; it takes LEAF or AHAF"),
        ({"kind": LeafGLU}, TypeError, "kind is <class.*; it takes LEAF or AHAF"),
        ({"granularity": "pixel"}, ValueError, "granularity is 'pixel'; it takes one of"),
        ({"channel_dim": 0}, ValueError, "channel_dim is 0; it takes an integer but 0, the batch"),
        ({"example_inputs": [X]}, TypeError, "example_inputs is of type list"),
        ({"rules": ["x"]}, TypeError, "rules is of type list"),
        ({"rules": {3: None}}, TypeError, "rules has the key 3"),
        ({"rules": {"x": "Cubic"}}, ValueError, "init_as is 'Cubic'.* in rules\\['x'\\]"),
        ({"rules": {"x": {"form": "ReLU"}}}, ValueError, "rules\\['x'\\] has \\['form'\\]; it takes init_as"),
        ({"rules": {"x": {"granularity": "pixel"}}}, ValueError, "granularity is 'pixel'.* in rules\\['x'\\]"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        replace_activations(**{"model": nn.Sequential(nn.ReLU()), **options})


def test_wrapped_model():
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Sequential(nn.ReLU())
    with pytest.raises(ValueError, match=r"model.0 is wrapped for data parallel training \(DistributedDataParallel\)"):
        replace_activations(nn.Sequential(wrapped))
