"""LEAF and AHAF as modules."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer
from typing_extensions import Self

from ._ops import PARAMETERS
from ._types import Device, Form, Size
from .functional import ahaf, arithmetic_dtype, leaf, stacklevel_of_caller

#: The initial forms (p1, p2, p3, p4) of the authors, and two more of the same family.
FORMS = {
    "ReLU": (1.0, 0.0, 2.0**16, 0.0),
    "SiLU": (1.0, 0.0, 1.0, 0.0),
    "Tanh": (0.0, 2.0, 2.0, -1.0),
    "Sigmoid": (0.0, 1.0, 1.0, 0.0),
    "CUSTOM": (1.0, 0.0, 10.0, 0.0),
    "GELU": (1.0, 0.0, 1.702, 0.0),
    "Identity": (2.0, 0.0, 0.0, 0.0),
}


def _is_low_precision(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < 4


def _warn_of_infinity(name: str, t: Tensor) -> None:
    """Warns where a conversion to low precision has made a parameter infinite."""
    has_values = type(t) in (Tensor, nn.Parameter) and not t.is_meta
    if has_values and _is_low_precision(t.dtype) and t.detach().float().isinf().any():
        warnings.warn(
            f"{name} is infinite in {t.dtype}, in which its value, such as 2^16 of the ReLU form, is lost, and the output "
            "will be NaN or infinite; keep or save it in torch.float32",
            stacklevel=stacklevel_of_caller(),
        )


def form_values(init_as: Form) -> tuple[float, float, float, float]:
    """(p1, p2, p3, p4) of a form's name, ("Swish", β), or an explicit tuple of four numbers."""
    if isinstance(init_as, str):
        if init_as in FORMS:
            return FORMS[init_as]
    elif isinstance(init_as, Sequence):
        if len(init_as) == 2 and init_as[0] == "Swish" and isinstance(init_as[1], numbers.Real):
            return (1.0, 0.0, float(init_as[1]), 0.0)
        if len(init_as) == 4 and all(isinstance(x, numbers.Real) for x in init_as):
            return tuple(float(x) for x in init_as)
    raise ValueError(
        f"init_as is {init_as!r}; it takes one of {', '.join(map(repr, FORMS))}, ('Swish', beta), or a tuple "
        "(p1, p2, p3, p4)"
    )


def _size(size) -> tuple[int, ...]:
    sizes = tuple(size) if isinstance(size, Iterable) else (size,)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise ValueError(f"size is {size!r}; it takes positive integers")
    return sizes


def size_of(granularity: str, shape: tuple[int, ...], channel: int = 0) -> tuple[int, ...]:
    """The parameters' size for activation maps of ``shape``, without the batch, whose channels are dimension ``channel``.

    Raises ValueError for an unknown granularity and IndexError where the map has no such dimension."""
    if granularity == "layer":
        return (1,)
    if granularity not in ("channel", "element"):
        raise ValueError(f"granularity is {granularity!r}; it takes one of 'layer', 'channel', 'element'")
    channels = (shape[channel],) + (1,) * (len(shape) - 1 - channel % len(shape))
    return channels if granularity == "channel" else shape


def check_model(model: nn.Module) -> None:
    """Raises TypeError if ``model`` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; it takes a torch.nn.Module")


def has_all_but_leaf_parameters(module: nn.Module, state_dict: dict, prefix: str) -> bool:
    """Whether a state dict has all of the module's parameters except those of LEAFs in the module."""
    of_leaf = {p for child in module.modules() if isinstance(child, LearnableActivation) for p in child.parameters()}
    return all(prefix + name in state_dict for name, p in module.named_parameters() if p not in of_leaf)


def _placed_as(t: Tensor, parameter: Tensor | None) -> Tensor:
    """t, made a DTensor if the parameter is one, since no plain tensor can be copied to a DTensor."""
    if not hasattr(parameter, "placements"):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, parameter.device_mesh, parameter.placements)


def has_hooks(module: nn.Module | ModuleType) -> bool:
    """Whether a module has hooks, or ``torch.nn.modules.module`` has some for all modules."""
    return any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))


def graph_call(module: nn.Module, cls: type[nn.Module], *inputs: Proxy) -> Proxy | None:
    """A call of the module in the graph that torch.fx traces, in which it then is a leaf module, as torch's own are.

    None where the module's forward is to be traced: where it is the root, or not in it; where the tracer looks into
    torch's own modules, too; and where more than the forward of ``cls`` is called (hooks, a forward or ``__call__`` of
    the instance or of a subclass), since that is under way already.
    """
    tracer = inputs[0].tracer
    if not isinstance(tracer, Tracer) or module is tracer.root:
        return None
    if has_hooks(module) or has_hooks(nn.modules.module) or "forward" in vars(module):
        return None
    if type(module).forward is not cls.forward or type(module).__call__ is not nn.Module.__call__:
        return None
    try:
        path = tracer.path_of_module(module)
    except NameError:
        return None
    return tracer.create_proxy("call_module", path, inputs, {}) if tracer.is_leaf_module(nn.SiLU(), path) else None


class ModuleParameter:
    """A class attribute that looks a module's parameter up in ``_parameters`` directly. Without it, Python would look
    everywhere else before it calls ``nn.Module.__getattr__``, four times in a forward.

    It is no data descriptor, so attributes of the instance come before it (pruning, FSDP's and DataParallel's views),
    and so does the property in the class of a parametrized module. A name that is not among the parameters but a
    buffer, say, is left to ``nn.Module.__getattr__`` as usual."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type) -> nn.Parameter:
        if module is None:
            return self
        try:
            return module._parameters[self.name]
        except KeyError:
            return module.__getattr__(self.name)


class LearnableActivation(nn.Module):
    """Base class of LEAF and AHAF: sizes, initial forms, and parameters that stay in float32.

    2^16, the ReLU form's p3, is infinite in float16. So a conversion of the module to float16, bfloat16 or less leaves
    these parameters in float32, unless ``keep_float32`` is False. Conversions to other dtypes and devices take effect.
    """

    keep_float32: bool

    def _initial_values(self) -> dict[str, tuple[float, ...]]:
        """The parameters' names and initial values: one for all elements, or one for each row."""
        raise NotImplementedError

    def _initial_tensor(self, values: tuple[float, ...], like: dict) -> Tensor:
        if len(values) == 1:
            return torch.full(self.size, values[0], **like)
        return torch.stack([torch.full(self.size[1:], value, **like) for value in values])

    def __init__(
        self,
        *,
        size: Size = (1,),
        init_as: Form = "ReLU",
        device: Device = None,
        dtype: torch.dtype | None = None,
        keep_float32: bool = True,
    ):
        super().__init__()
        self.size = _size(size)
        self.init_as = init_as
        self.keep_float32 = keep_float32
        if dtype is None:
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype is {dtype}; it takes a floating-point dtype")
        for name, values in self._initial_values().items():
            for value in values:
                if abs(value) > torch.finfo(dtype).max and math.isfinite(value):
                    raise ValueError(
                        f"dtype is {dtype}, which cannot hold {name} = {value:g} of the form {init_as!r}; it takes "
                        "torch.float32 (also for inputs in half precision) or torch.bfloat16"
                    )
            setattr(self, name, nn.Parameter(torch.empty(self.size, device=device, dtype=dtype)))
        self.reset_parameters()

    @classmethod
    def per_layer(cls, **kwargs: Any) -> Self:
        """One set of parameters for the whole layer, of shape (1,)."""
        return cls(size=(1,), **kwargs)

    @classmethod
    def per_channel(cls, num_channels: int, spatial_dims: int = 2, **kwargs: Any) -> Self:
        """One set per channel, of shape (num_channels, 1, ...) with a 1 for each spatial dimension behind the channels.

        ``spatial_dims=2`` is for (N, C, H, W), in either memory format; 0 for (N, C), (N, L, C) and (N, H, W, C).
        """
        if not isinstance(spatial_dims, int) or spatial_dims < 0:
            raise ValueError(f"spatial_dims is {spatial_dims!r}; it takes an integer from 0")
        return cls(size=(num_channels,) + (1,) * spatial_dims, **kwargs)

    @classmethod
    def per_element(cls, shape: Size, **kwargs: Any) -> Self:
        """One set per element of the activation map, whose shape, without the batch, is ``shape``."""
        return cls(size=shape, **kwargs)

    def reset_parameters(self) -> None:
        """Resets the parameters to the initial form."""
        for name, values in self._initial_values().items():
            p = getattr(self, name)
            if len(values) == 1:
                nn.init.constant_(p, values[0])
                continue
            with torch.no_grad():
                p.copy_(_placed_as(self._initial_tensor(values, {"dtype": p.dtype, "device": p.device}), p))

    def add_initial_values(self, state_dict: dict, prefix: str, weight: Tensor | None) -> None:
        """Adds this module's parameters, in their initial form, to a state dict that has none of them, such as that of
        a module with fixed activations. A ``weight`` from the state dict gives the dtype and the device."""
        values = {f"{prefix}{name}": values for name, values in self._initial_values().items()}
        if weight is None or not values.keys().isdisjoint(state_dict):
            return
        like = {"dtype": arithmetic_dtype(weight.dtype), "device": weight.device}
        initial = {key: self._initial_tensor(value, like) for key, value in values.items()}
        state_dict |= {key: _placed_as(t, getattr(self, key.removeprefix(prefix), None)) for key, t in initial.items()}

    def parts(self) -> dict[str, tuple]:
        """The module's activations, for plots: what to append to its name → (initial form, p1, p2, p3, p4)."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        def keeping_float32(t: Tensor) -> Tensor:
            result = fn(t)
            if _is_low_precision(result.dtype) and not _is_low_precision(t.dtype):
                return t.to(device=result.device, dtype=torch.float32)
            return result

        before = {name: p.dtype for name, p in self.named_parameters(recurse=False)}
        super()._apply(keeping_float32 if self.keep_float32 else fn, recurse)
        for name, p in self.named_parameters(recurse=False):
            if p.dtype != before[name]:
                _warn_of_infinity(name, p)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        for name, own in self.named_parameters(recurse=False):
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor) and _is_low_precision(loaded.dtype):
                _warn_of_infinity(prefix + name, loaded)
                # With assign=True the checkpoint's tensors become the parameters.
                assign = local_metadata.get("assign_to_params_buffers", False)
                if self.keep_float32 and assign and not _is_low_precision(own.dtype):
                    state_dict[prefix + name] = loaded.to(own.dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        extra = f"size={self.size}, init_as={self.init_as!r}"
        return extra if self.keep_float32 else extra + ", keep_float32=False"


class FourParameters(LearnableActivation):
    """Base class of modules with the p1, p2, p3 and p4 of one LEAF."""

    p1, p2, p3, p4 = ModuleParameter(), ModuleParameter(), ModuleParameter(), ModuleParameter()

    def _initial_values(self) -> dict[str, tuple[float, ...]]:
        return {name: (value,) for name, value in zip(PARAMETERS, form_values(self.init_as))}

    def parts(self) -> dict[str, tuple]:
        return {"": (self.init_as, self.p1, self.p2, self.p3, self.p4)}


class LEAF(FourParameters):
    """Learnable Extended Activation Function, y = (p1·u + p2)·σ(p3·u) + p4, with trained p1, p2, p3 and p4.

    Bodyanskiy & Kostiuk 2023, doi 10.47839/ijc.22.3.3225. A drop-in for an activation module: any shape to the same
    shape, in float64, float32, bfloat16 or float16.

    Args:
        size: the shape of each parameter, which broadcasts to the input's by PyTorch's right-aligned rule: (1,) per
            layer, (C, 1, 1) per channel of (N, C, H, W), the activation map's own shape per element. See
            :meth:`per_layer`, :meth:`per_channel`, :meth:`per_element`.
        init_as: the initial form: "ReLU", "SiLU", "Tanh", "Sigmoid", "CUSTOM", "GELU", "Identity", ("Swish", β), or a
            tuple (p1, p2, p3, p4).
        device, dtype: of the parameters; float32 also serves bfloat16 and float16 inputs, float64 inputs need float64.
        keep_float32: whether the parameters stay in float32 when the module is converted to float16 or bfloat16.

    Raises:
        ValueError: an unknown ``init_as``, a non-positive ``size``, or a form that ``dtype`` cannot hold.
        TypeError: ``dtype`` is no floating-point dtype.
    """

    def forward(self, u: Tensor) -> Tensor:
        if isinstance(u, Proxy) and (call := graph_call(self, LEAF, u)) is not None:
            return call
        return leaf(u, self.p1, self.p2, self.p3, self.p4)


class AHAF(LearnableActivation):
    """Adaptive Hybrid Activation Function, y = β·u·σ(γ·u), with trained ``gamma`` and ``beta``.

    Bodyanskiy & Kostiuk 2022, doi 10.20535/srit.2308-8893.2022.1.07. Arguments as :class:`LEAF`'s; ``init_as`` is a form
    with p2 = p4 = 0 and p3 ≠ 0: "ReLU", "SiLU", "CUSTOM", "GELU" or ("Swish", β).
    """

    gamma, beta = ModuleParameter(), ModuleParameter()

    def _initial_values(self) -> dict[str, tuple[float, ...]]:
        p1, p2, p3, p4 = form_values(self.init_as)
        if p2 != 0 or p3 == 0 or p4 != 0:
            raise ValueError(
                f"init_as is {self.init_as!r}, which is no form of AHAF: y = β·u·σ(γ·u) has p2 = p4 = 0 and p3 ≠ 0"
            )
        return {"gamma": (p3,), "beta": (p1,)}

    def parts(self) -> dict[str, tuple]:
        return {"": (self.init_as, self.beta, None, self.gamma, None)}

    def forward(self, u: Tensor) -> Tensor:
        if isinstance(u, Proxy) and (call := graph_call(self, AHAF, u)) is not None:
            return call
        return ahaf(u, self.beta, self.gamma)
