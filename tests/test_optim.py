"""Parameter groups and the double-stage procedure. The authors' own trajectories are in test_golden.py."""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import leaf_cuda
from leaf_cuda.optim import DoubleStageTuner, leaf_param_groups, split_activation_parameters


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 8),
        leaf_cuda.LEAF(size=(8,), init_as="SiLU"),
        nn.Linear(8, 4),
        leaf_cuda.AHAF(init_as="SiLU"),
    ]
    return nn.Sequential(*layers, nn.Linear(4, 1)).to(dtype)


def loss_of(model, scale=1.0):
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)).to(model[0].weight.dtype)
    return lambda: scale * model(x).float().square().mean()


def sgd(model, cls=torch.optim.SGD, **kwargs):
    """The tuner's two optimizers."""
    weights, *activations = leaf_param_groups(model, lr=0.1)
    return cls(activations, **kwargs), cls([weights], **kwargs)


def same(a, b):
    return len(a) == len(b) and all(x is y for x, y in zip(a, b))


def assert_models_equal(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


# ---- parameter groups ------------------------------------------------------------------------------------------------


def test_split():
    model = network()
    leaf, ahaf = model[1], model[3]
    activations, others = split_activation_parameters(model)
    assert same(activations, [leaf.p1, leaf.p2, leaf.p3, leaf.p4, ahaf.gamma, ahaf.beta])
    assert same(others, [p for i in (0, 2, 4) for p in model[i].parameters()])
    assert same(split_activation_parameters(leaf)[0], list(leaf.parameters()))


def test_split_of_shared():
    leaf = leaf_cuda.LEAF()
    other = leaf_cuda.LEAF()
    other.p1 = leaf.p1
    linear = nn.Linear(3, 3)
    activations, others = split_activation_parameters(nn.Sequential(linear, leaf, linear, leaf, other))
    assert same(activations, [*leaf.parameters(), other.p2, other.p3, other.p4])
    assert same(others, list(linear.parameters()))


def test_split_of_parametrized_and_wrapped():
    class Positive(nn.Module):
        def forward(self, p):
            return p.exp()

    model = network()
    nn.utils.parametrize.register_parametrization(model[1], "p2", Positive())
    activations, others = split_activation_parameters(model)
    assert len(activations) == 6 and len(others) == 6
    p2 = model[1].parametrizations.p2.original
    assert same(leaf_param_groups(torch.compile(model), lr=1.0, p24_lr=0.1)[2]["params"], [model[1].p4, p2])


def test_groups():
    model = network()
    leaf, ahaf = model[1], model[3]
    weights, activations = leaf_param_groups(model, lr=0.5, weight_decay=0.01)
    assert same(weights["params"], split_activation_parameters(model)[1])
    assert same(activations["params"], split_activation_parameters(model)[0])
    assert [weights["weight_decay"], activations["weight_decay"]] == [0.01, 0]
    weights, activations, p24 = leaf_param_groups(model, lr=0.5, p24_lr=0.1, weight_decay=0.01)
    assert same(activations["params"], [leaf.p1, leaf.p3, ahaf.gamma, ahaf.beta])
    assert same(p24["params"], [leaf.p2, leaf.p4])
    assert [g["lr"] for g in (weights, activations, p24)] == [0.5, 0.5, 0.1]
    assert [g["weight_decay"] for g in (weights, activations, p24)] == [0.01, 0, 0]
    assert [g["name"] for g in (weights, activations, p24)] == ["weights", "activations", "p2 and p4"]


def test_decay_is_the_optimizers_own():
    """Without weight_decay, the weights get the optimizer's own decay, and the activations still get none."""
    weights, *activations = torch.optim.AdamW(leaf_param_groups(network(), 0.5, 0.1), weight_decay=0.05).param_groups
    assert weights["weight_decay"] == 0.05 and [g["weight_decay"] for g in activations] == [0, 0]
    weights, *_ = torch.optim.AdamW(leaf_param_groups(network(), 0.5, weight_decay=0.0), weight_decay=0.05).param_groups
    assert weights["weight_decay"] == 0


def test_groups_of_tensor_rates():
    """A scheduler changes a tensor rate in place; it must change each group's only once."""
    lr, p24_lr = torch.tensor(0.5), torch.tensor(0.25)
    optimizer = torch.optim.SGD(leaf_param_groups(network(), lr, p24_lr))
    other = torch.optim.SGD(leaf_param_groups(network(), lr, p24_lr))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    assert [g["lr"].item() for g in optimizer.param_groups] == [0.25, 0.25, 0.125]
    assert [g["lr"].item() for g in other.param_groups] == [0.5, 0.5, 0.25]
    assert (lr.item(), p24_lr.item()) == (0.5, 0.25)


def test_groups_in_an_optimizer():
    """One step of plain SGD uses each group's own rate and decay."""
    model = network()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(leaf_param_groups(model, lr=0.5, p24_lr=0.0, weight_decay=0.01))
    loss_of(model)().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if name in ("1.p2", "1.p4"):
            assert torch.equal(p, before[name])
        else:
            decay = 0 if name[0] in "13" else 0.01
            torch.testing.assert_close(p, before[name] - 0.5 * (p.grad + decay * before[name]), msg=name)


def test_nothing_to_split():
    linear = nn.Linear(3, 3)
    (only,) = leaf_param_groups(linear, lr=0.1, p24_lr=0.1)
    assert only["name"] == "weights" and same(only["params"], list(linear.parameters()))
    assert split_activation_parameters(nn.Sequential()) == ([], [])
    assert [g["params"] for g in leaf_param_groups(nn.Sequential(), lr=0.1)] == [[]]
    weights, *activations = leaf_param_groups(leaf_cuda.LEAF(), lr=0.1)
    assert weights["params"] == [] and len(activations[0]["params"]) == 4
    with pytest.raises(TypeError, match="model is of type list; it takes a torch.nn.Module"):
        split_activation_parameters([linear])


# ---- the tuner -------------------------------------------------------------------------------------------------------


def test_two_stages():
    """As by hand: the activation parameters step by the gradients at the start, the weights by those after that
    step."""
    model, own = network(torch.float64), network(torch.float64)
    result = DoubleStageTuner(*sgd(model)).step(loss_of(model))
    activations, weights = split_activation_parameters(own)
    for stage in (activations, weights):
        loss = loss_of(own)()
        with torch.no_grad():
            for p, g in zip(stage, torch.autograd.grad(loss, stage)):
                p.add_(g, alpha=-0.1)
    assert_models_equal(model, own)
    assert torch.equal(result, loss.detach()) and not result.requires_grad
    assert all(p.grad is not None for p in model.parameters())


def test_single_pass():
    """It does what a single optimizer of all parameters does."""
    model, own = network(torch.float64), network(torch.float64)
    result = DoubleStageTuner(*sgd(model), single_pass=True).step(loss_of(model))
    loss = loss_of(own)()
    loss.backward()
    torch.optim.SGD(own.parameters(), lr=0.1).step()
    assert_models_equal(model, own)
    assert torch.equal(result, loss.detach())


@pytest.mark.parametrize("single_pass", [False, True])
def test_only_the_stages_parameters_require_gradients(single_pass):
    model = network()
    model[0].bias.requires_grad_(False)
    seen = []

    def closure():
        seen.append([n for n, p in model.named_parameters() if p.requires_grad])
        return loss_of(model)()

    before = [p.requires_grad for p in model.parameters()]
    DoubleStageTuner(*sgd(model), single_pass=single_pass).step(closure)
    weights = ["0.weight", "2.weight", "2.bias", "4.weight", "4.bias"]
    activations = ["1.p1", "1.p2", "1.p3", "1.p4", "3.gamma", "3.beta"]
    assert [set(s) for s in seen] == ([{*weights, *activations}] if single_pass else [set(activations), set(weights)])
    assert [p.requires_grad for p in model.parameters()] == before
    assert model[0].bias.grad is None


@pytest.mark.parametrize("stage", [0, 1])
def test_flags_are_restored_when_the_closure_raises(stage):
    model = network()
    model[1].p4.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    calls = []

    def closure():
        calls.append(None)
        if len(calls) > stage:
            raise KeyError("planned")
        return loss_of(model)()

    with pytest.raises(KeyError, match="planned"):
        DoubleStageTuner(*sgd(model)).step(closure)
    assert [p.requires_grad for p in model.parameters()] == before


def test_gradients_of_before_are_cleared():
    model, own = network(), network()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    DoubleStageTuner(*sgd(model)).step(loss_of(model))
    DoubleStageTuner(*sgd(own)).step(loss_of(own))
    assert_models_equal(model, own)


def test_under_no_grad():
    model, own = network(), network()
    with torch.no_grad():
        DoubleStageTuner(*sgd(model)).step(loss_of(model))
    DoubleStageTuner(*sgd(own)).step(loss_of(own))
    assert_models_equal(model, own)


@pytest.mark.parametrize("single_pass", [False, True])
def test_clipping(single_pass):
    """Each optimizer's gradients are scaled to the norm, as clip_grad_norm_ does."""
    model = network(torch.float64)
    DoubleStageTuner(*sgd(model), clip_grad_norm=1e-3, single_pass=single_pass).step(loss_of(model, 100.0))
    for parameters in split_activation_parameters(model):
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
        torch.testing.assert_close(norm.item(), 1e-3, rtol=1e-4, atol=0)


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("single_pass", [False, True])
def test_scaler(clip, single_pass):
    """A scale of 2^16 changes nothing; an overflow skips the stage it happens in and lowers the scale."""
    model, own = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    options = {"clip_grad_norm": clip, "single_pass": single_pass}
    DoubleStageTuner(*sgd(own), **options).step(loss_of(own))
    tuner = DoubleStageTuner(*sgd(model), scaler=scaler, **options)
    tuner.step(loss_of(model))
    for p, q in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert scaler.get_scale() == 2.0**16

    before = copy.deepcopy(model)
    tuner.step(loss_of(model, 1e37))
    assert_models_equal(model, before)
    assert scaler.get_scale() == 2.0 ** (15 if single_pass else 14)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_scaler_and_frozen_weights(clip):
    """A scaler makes no difference where one optimizer has no gradients."""
    models = [network(), network()]
    for model, scaler in zip(models, (None, torch.amp.GradScaler("cpu", init_scale=2.0**16))):
        for p in split_activation_parameters(model)[1]:
            p.requires_grad_(False)
        tuner = DoubleStageTuner(*sgd(model), scaler=scaler, clip_grad_norm=clip, single_pass=True)
        for _ in range(2):
            tuner.step(loss_of(model))
    for p, q, initial in zip(*(m.parameters() for m in (*models, network())), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert torch.equal(p, initial) or p.requires_grad


def test_zero_grad_that_keeps_tensors():
    class Keeping(torch.optim.SGD):
        def zero_grad(self, set_to_none=False):
            super().zero_grad(set_to_none)

    model, own = network(), network()
    tuner, own_tuner = DoubleStageTuner(*sgd(model, Keeping)), DoubleStageTuner(*sgd(own))
    for _ in range(2):
        tuner.step(loss_of(model))
        own_tuner.step(loss_of(own))
    assert_models_equal(model, own)


def test_autocast():
    """Autocast around the step equals autocast inside the closure. Later steps use the new weights."""
    models = [network(), network()]
    inside, around = (DoubleStageTuner(*sgd(m)) for m in models)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def closure():
        with autocast():
            return loss_of(models[0])()

    with autocast():
        for _ in range(3):
            around.step(loss_of(models[1]))
    for _ in range(3):
        inside.step(closure)
    assert_models_equal(*models)


def test_schedulers():
    model = network()
    optimizers = sgd(model)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]
    tuner = DoubleStageTuner(*optimizers)
    rates = []
    for _ in range(3):
        tuner.step(loss_of(model))
        for s in schedulers:
            s.step()
        rates.append([o.param_groups[0]["lr"] for o in optimizers])
    assert rates == [[0.05] * 2, [0.025] * 2, [0.0125] * 2]


def test_compiled_closure():
    """One graph per stage at most, and none in later steps."""
    model, own = network(), network()
    frames = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    tuner, own_tuner = DoubleStageTuner(*sgd(model)), DoubleStageTuner(*sgd(own))
    x = torch.randn(10, 6)
    for _ in range(4):
        tuner.step(lambda: compiled(x).square().mean())
        own_tuner.step(lambda: own(x).square().mean())
    assert 1 <= frames.frame_count <= 2
    assert_models_equal(model, own)


def test_deterministic_in_training():
    """The loss falls, and a second training gives the same, bit for bit."""
    losses = []
    for _ in range(2):
        model = network()
        tuner = DoubleStageTuner(*sgd(model, torch.optim.Adam))
        losses.append([tuner.step(loss_of(model)).item() for _ in range(20)])
    assert losses[0] == losses[1] and losses[0][-1] < 0.5 * losses[0][0]


@pytest.mark.parametrize(
    "closure, error, message",
    [
        (lambda model: 1.0, TypeError, "closure returned float; it takes a closure that returns the loss"),
        (lambda model: model(torch.ones(2, 6)), ValueError, r"closure returned a tensor of shape \(2, 1\)"),
        (lambda model: torch.ones(()), RuntimeError, "depends on no parameter, of activation_optimizer, that"),
    ],
)
def test_closures_that_are_none(closure, error, message):
    model = network()
    with pytest.raises(error, match=message):
        DoubleStageTuner(*sgd(model)).step(lambda: closure(model))


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")])
def test_loss_of_another_parameter(scaler):
    """The other parameter requires a gradient, but is in neither optimizer."""
    other = torch.ones((), requires_grad=True)
    with pytest.raises(RuntimeError, match="depends on no parameter, of activation_optimizer, that"):
        DoubleStageTuner(*sgd(network()), scaler=scaler).step(lambda: other * 2)


def test_closure_that_runs_backward():
    model = network()
    before = copy.deepcopy(model)

    def closure():
        loss = loss_of(model)()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="closure ran backward"):
        DoubleStageTuner(*sgd(model)).step(closure)
    assert_models_equal(model, before)


def test_constructor_checks():
    model = network()
    activations, weights = sgd(model)
    everything = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="weight_optimizer has 6 parameters of activation_optimizer"):
        DoubleStageTuner(activations, everything)
    with pytest.raises(ValueError, match="clip_grad_norm is 0"):
        DoubleStageTuner(activations, weights, clip_grad_norm=0)
    with pytest.raises(TypeError, match="clip_grad_norm is '1'; it takes a positive number"):
        DoubleStageTuner(activations, weights, clip_grad_norm="1")
    with pytest.raises(TypeError, match="weight_optimizer is of type generator; it takes a torch.optim.Optimizer"):
        DoubleStageTuner(activations, model.parameters())
    with pytest.raises(TypeError, match="weight_optimizer is of type LBFGS, whose step needs a closure; it takes one"):
        DoubleStageTuner(activations, torch.optim.LBFGS(weights.param_groups[0]["params"]))
    with pytest.raises(TypeError, match="scaler is of type float; it takes a torch.amp.GradScaler or None"):
        DoubleStageTuner(activations, weights, scaler=2.0)
    with pytest.raises(TypeError, match="closure is of type Tensor; it takes a function"):
        DoubleStageTuner(activations, weights).step(torch.ones(()))
