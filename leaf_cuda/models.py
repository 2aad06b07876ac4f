"""The two networks of the paper's evaluation, with any activation.

Their state dicts have the keys and shapes of the authors' networks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .modules import LearnableActivation, size_of

#: Makes the activation for a map of the given shape without the batch: (C, H, W) or (features,).
MakeActivation = Callable[[tuple[int, ...]], nn.Module]


def activation(kind: type[nn.Module], granularity: str = "element", **options: Any) -> MakeActivation:
    """A function that makes a network's activations: ``LeNet5(conv=activation(LEAF, "channel", init_as="SiLU"))``.

    Args:
        kind: LEAF or AHAF, or a fixed activation such as ``nn.SiLU``, which has no granularity.
        granularity: "layer", "channel" or "element"; for a layer of features the last two are the same.
        options: keyword arguments of ``kind``.

    Raises:
        TypeError: ``kind`` is no class of modules.
        ValueError: an unknown ``granularity``.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind is {kind!r}; it takes a class of modules, such as LEAF or nn.SiLU")
    size_of(granularity, (1,))
    if not issubclass(kind, LearnableActivation):
        return lambda shape: kind(**options)
    return lambda shape: kind(size=size_of(granularity, shape), **options)


def _checked(name: str, make: MakeActivation) -> MakeActivation:
    """The argument `make` called `name`, which must be a function; the result raises if `make` makes no module."""
    takes = "it takes a function of the map's shape that makes an activation, such as activation(nn.ReLU)"
    if isinstance(make, nn.Module | type) or not callable(make):
        raise TypeError(f"{name} is {make!r}; {takes}")

    def made(shape: tuple[int, ...]) -> nn.Module:
        layer = make(shape)
        if not isinstance(layer, nn.Module):
            raise TypeError(f"{name} made {layer!r}; {takes}")
        return layer

    return made


class _Network(nn.Module):
    """Base class of the networks. LeNet5's docstring describes the arguments."""

    _least: int  # height and width of the smallest image

    def __init__(
        self,
        input_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        *,
        conv: MakeActivation = activation(nn.ReLU),
        fc: MakeActivation = activation(nn.ReLU),
    ):
        conv, fc = _checked("conv", conv), _checked("fc", fc)
        if (
            not isinstance(input_shape, Sequence)
            or len(input_shape) != 3
            or input_shape[0] < 1
            or min(input_shape[1:]) < self._least
        ):
            raise ValueError(
                f"input_shape is {input_shape}; {type(self).__name__} takes (channels, height, width) from "
                f"{self._least} by {self._least}"
            )
        super().__init__()
        for name, layer in self._layers(*input_shape, num_classes, conv, fc).items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():  # children() would yield a shared activation only once
            x = layer(x)
        return x

    @staticmethod
    def _layers(c: int, h: int, w: int, num_classes: int, conv: MakeActivation, fc: MakeActivation) -> OrderedDict:
        raise NotImplementedError


class LeNet5(_Network):
    """LeNet-5 of arXiv 1801.09403: images (N, *input_shape), at least 16 by 16 → logits (N, num_classes).

    Args:
        input_shape: (channels, height, width). (1, 28, 28) is Fashion-MNIST's, (3, 32, 32) CIFAR-10's.
        conv, fc: the activations of the convolutional and the fully connected part, by :func:`activation`.

    Raises:
        ValueError: ``input_shape`` is no such shape, or too small for the network.
        TypeError: ``conv`` or ``fc`` is no function, or makes no module.
    """

    _least = 16

    @staticmethod
    def _layers(c, h, w, num_classes, conv, fc):
        h1, w1 = h - 4, w - 4
        h2, w2 = h1 // 2 - 4, w1 // 2 - 4
        return OrderedDict(
            conv1=nn.Conv2d(c, 20, 5, bias=False),
            act1=conv((20, h1, w1)),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5, bias=False),
            act2=conv((50, h2, w2)),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc3=nn.Linear(50 * (h2 // 2) * (w2 // 2), 500),
            act3=fc((500,)),
            fc4=nn.Linear(500, num_classes, bias=False),
        )


class KerasNet(_Network):
    """KerasNet of arXiv 1801.09403, after an example of Keras 1: images (N, *input_shape), at least 10 by 10 → logits
    (N, num_classes). Arguments and errors as :class:`LeNet5`'s."""

    _least = 10

    @staticmethod
    def _layers(c, h, w, num_classes, conv, fc):
        h2, w2 = h - 2, w - 2
        h4, w4 = h2 // 2, w2 // 2
        h5, w5 = h4 - 2, w4 - 2
        return OrderedDict(
            conv1=nn.Conv2d(c, 32, 3, padding=1),
            act1=conv((32, h, w)),
            conv2=nn.Conv2d(32, 32, 3),
            act2=conv((32, h2, w2)),
            pool3=nn.MaxPool2d(2),
            drop3=nn.Dropout2d(0.25),
            conv4=nn.Conv2d(32, 64, 3, padding=1),
            act4=conv((64, h4, w4)),
            conv5=nn.Conv2d(64, 64, 3),
            act5=conv((64, h5, w5)),
            pool6=nn.MaxPool2d(2),
            drop6=nn.Dropout2d(0.25),
            flatten=nn.Flatten(),
            fc7=nn.Linear(64 * (h5 // 2) * (w5 // 2), 512),
            act7=fc((512,)),
            drop7=nn.Dropout(0.2),
            fc8=nn.Linear(512, num_classes),
        )
