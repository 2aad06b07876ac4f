"""PyTorch's fixed activations: LEAF's form for each, and the functions and Tensor methods that compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ._types import Form


@dataclass(frozen=True)
class Fixed:
    """A fixed activation.

    ``form`` is LEAF's form of it (``init_as``), or None if none is near it. ``calls`` are the functions, and the names
    of Tensor methods, that compute it; after the input they take the arguments of the module's constructor, in its
    order. ``in_place`` are those that change their input.
    """

    form: Form | None
    calls: tuple[Callable | str, ...]
    in_place: tuple[Callable | str, ...] = ()


class QuickGELU(nn.Module):
    """x·σ(1.702·x), which torch has no module of. Hendrycks & Gimpel 2016, arXiv 1606.08415."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


#: The fixed activations by their module's class. The first four forms equal the activation, the others approximate it:
#: 1.05 and 0.94 minimise the largest difference.
FIXED: dict[type[nn.Module], Fixed] = {
    nn.ReLU: Fixed("ReLU", (F.relu, torch.relu, "relu"), (F.relu_, "relu_")),
    nn.SiLU: Fixed("SiLU", (F.silu,)),
    nn.Tanh: Fixed("Tanh", (F.tanh, torch.tanh, "tanh"), (torch.tanh_, "tanh_")),
    nn.Sigmoid: Fixed(
        "Sigmoid", (F.sigmoid, torch.sigmoid, torch.special.expit, "sigmoid"), (torch.sigmoid_, "sigmoid_")
    ),
    nn.GELU: Fixed("GELU", (F.gelu,)),
    QuickGELU: Fixed("GELU", ()),
    nn.Hardswish: Fixed(("Swish", 1.05), (F.hardswish,)),
    nn.Hardsigmoid: Fixed((0.0, 1.0, 0.94, 0.0), (F.hardsigmoid,)),
    nn.CELU: Fixed(None, (F.celu, torch.celu), (F.celu_,)),
    nn.ELU: Fixed(None, (F.elu,), (F.elu_,)),
    nn.Hardshrink: Fixed(None, (F.hardshrink, "hardshrink")),
    nn.Hardtanh: Fixed(None, (F.hardtanh,), (F.hardtanh_,)),
    nn.LeakyReLU: Fixed(None, (F.leaky_relu,), (F.leaky_relu_,)),
    nn.LogSigmoid: Fixed(None, (F.logsigmoid,)),
    nn.Mish: Fixed(None, (F.mish,)),
    nn.PReLU: Fixed(None, ()),  # F.prelu takes a tensor
    nn.ReLU6: Fixed(None, (F.relu6,)),
    nn.RReLU: Fixed(None, ()),  # F.rrelu takes other arguments
    nn.SELU: Fixed(None, (F.selu, torch.selu), (F.selu_,)),
    nn.Softplus: Fixed(None, (F.softplus,)),
    nn.Softshrink: Fixed(None, (F.softshrink,)),
    nn.Softsign: Fixed(None, (F.softsign,)),
    nn.Tanhshrink: Fixed(None, (F.tanhshrink,)),
    nn.Threshold: Fixed(None, (F.threshold, torch.threshold), (F.threshold_,)),
}

_MODULE_OF = {call: kind for kind, fixed in FIXED.items() for call in (*fixed.calls, *fixed.in_place)}
_IN_PLACE = {call for fixed in FIXED.values() for call in fixed.in_place}


def module_type(call: Callable | str) -> type[nn.Module] | None:
    """The class of modules that compute the same as a function or as the Tensor method of a name, or None."""
    try:
        return _MODULE_OF.get(call)
    except TypeError:  # not hashable
        return None


def is_in_place(call: Callable | str) -> bool:
    """Whether a function or method that has a :func:`module_type` always changes its input."""
    return call in _IN_PLACE


#: The names by which code calls them, as in `F.relu(x)` and `x.relu()`.
CALLED_NAMES = {call for call in _MODULE_OF if isinstance(call, str)}.union(
    name for scope in (F, torch, torch.special) for name, value in vars(scope).items() if module_type(value)
)
