"""LeNet5 and KerasNet: the paper's numbers of parameters, the authors' keys and shapes."""

import pytest
import torch
from torch import nn

from leaf_cuda import AHAF, LEAF
from leaf_cuda.models import KerasNet, LeNet5, activation
from leaf_cuda.optim import split_activation_parameters

FASHION_MNIST, CIFAR10 = (1, 28, 28), (3, 32, 32)
COUNTS = [
    (LeNet5, FASHION_MNIST, 431_000, 60_880),
    (LeNet5, CIFAR10, 657_000, 84_720),
    (KerasNet, FASHION_MNIST, 889_834, 263_168),
    (KerasNet, CIFAR10, 1_250_858, 349_184),
]


def count(parameters):
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("kind, shape, of_weights, of_leaf", COUNTS)
def test_numbers_of_parameters(kind, shape, of_weights, of_leaf):
    leaf = activation(LEAF, "element")
    activations, weights = split_activation_parameters(kind(shape, conv=leaf, fc=leaf))
    assert (count(weights), count(activations)) == (of_weights, of_leaf)
    assert count(kind(shape).parameters()) == of_weights


@pytest.mark.parametrize("kind, shape, of_weights, of_leaf", COUNTS)
@pytest.mark.parametrize(
    "conv, fc",
    [
        (activation(LEAF, "element"), activation(LEAF, "element", init_as="Tanh")),
        (activation(LEAF, "channel", init_as="SiLU"), activation(AHAF, "layer")),
        (activation(nn.Tanh), activation(LEAF, "channel")),
        (activation(AHAF, "element"), activation(nn.LeakyReLU, negative_slope=0.1)),
    ],
)
def test_trains(kind, shape, of_weights, of_leaf, conv, fc):
    model = kind(shape, num_classes=7, conv=conv, fc=fc)
    y = model(torch.randn(2, *shape))
    assert y.shape == (2, 7)
    y.logsumexp(1).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sizes():
    model = KerasNet(CIFAR10, conv=activation(LEAF, "channel"), fc=activation(LEAF, "layer"))
    sizes = {name: m.size for name, m in model.named_children() if isinstance(m, LEAF)}
    assert sizes == {n: (c, 1, 1) for n, c in [("act1", 32), ("act2", 32), ("act4", 64), ("act5", 64)]} | {"act7": (1,)}
    assert LeNet5(conv=activation(LEAF), fc=activation(LEAF)).act3.size == (500,)


def test_keys():
    """They are those of the authors' checkpoints."""
    leaf = activation(LEAF)

    def keys(*layers):
        return [f"{layer}.{p}" for layer, names in layers for p in names.split()]

    p = "p1 p2 p3 p4"
    lenet = [("conv1", "weight"), ("act1", p), ("conv2", "weight"), ("act2", p), ("fc3", "weight bias"), ("act3", p)]
    assert list(LeNet5(conv=leaf, fc=leaf).state_dict()) == keys(*lenet, ("fc4", "weight"))
    kerasnet = [(f"{kind}{i}", p if kind == "act" else "weight bias") for i in (1, 2, 4, 5) for kind in ("conv", "act")]
    kerasnet += [("fc7", "weight bias"), ("act7", p), ("fc8", "weight bias")]
    assert list(KerasNet(conv=leaf, fc=leaf).state_dict()) == keys(*kerasnet)
    shapes = {k: tuple(v.shape) for k, v in KerasNet(CIFAR10, conv=leaf, fc=leaf).state_dict().items()}
    assert (shapes["act1.p1"], shapes["act5.p4"], shapes["fc7.weight"]) == ((32, 32, 32), (64, 13, 13), (512, 2304))


def test_shared_activation():
    """One module in every place; the state dict has its parameters under the name of each."""
    shared = LEAF(init_as="SiLU")
    own, fixed = LeNet5(conv=lambda shape: shared, fc=lambda shape: shared), LeNet5(conv=activation(nn.SiLU))
    fixed.act3 = nn.SiLU()
    fixed.load_state_dict({k: v for k, v in own.state_dict().items() if "act" not in k})
    x = torch.randn(2, *FASHION_MNIST)
    torch.testing.assert_close(own(x), fixed(x))
    assert count(split_activation_parameters(own)[0]) == 4


def test_dropout():
    assert [m.p for m in KerasNet().modules() if isinstance(m, nn.Dropout2d | nn.Dropout)] == [0.25, 0.25, 0.2]


def test_errors():
    for kind, small in ((LeNet5, (1, 15, 28)), (KerasNet, (1, 28, 9))):
        with pytest.raises(ValueError, match=f"input_shape is .*; {kind.__name__} takes"):
            kind(small)
        least = tuple(n + 1 if n in (15, 9) else n for n in small)
        assert kind(least)(torch.randn(1, *least)).shape == (1, 10)
    with pytest.raises(ValueError, match="granularity is 'pixel'; it takes one of 'layer', 'channel', 'element'"):
        activation(LEAF, "pixel")
    with pytest.raises(TypeError, match="kind is 'SiLU'; it takes a class of modules"):
        activation("SiLU")
    with pytest.raises(ValueError, match="input_shape is 28; LeNet5 takes"):
        LeNet5(28)
    for wrong in (nn.ReLU(), "relu", nn.SiLU, LEAF):
        with pytest.raises(
            TypeError, match="fc is .*; it takes a function of the map's shape that makes an activation"
        ):
            KerasNet(fc=wrong)
    for made in (None, torch.relu):
        with pytest.raises(TypeError, match="conv made .*; it takes a function of the map's shape that makes"):
            LeNet5(conv=lambda shape: made)
