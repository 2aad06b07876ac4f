"""LEAF and AHAF as functions of tensors."""

from __future__ import annotations

import numbers
import re
import sys
import warnings

import torch
from torch import Tensor

from . import _ops, reference, sharding
from .function import LeafFunction, needs_autograd_function


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on tensors of the given dtype, and of LEAF's parameters beside weights of it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class FallbackWarning(UserWarning):
    """leaf_cuda runs the PyTorch formula, because this build has no fused kernel for the device."""


_warned: set[str] = set()


def stacklevel_of_caller() -> int:
    """The ``stacklevel`` with which a warning issued by the function that calls this points to the user's line that
    called leaf_cuda, directly or through a module."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("leaf_cuda", "torch"):
        level, frame = level + 1, frame.f_back
    return level


@_ops.constant_to_dynamo  # Dynamo cannot trace a warning
def _warn_fallback(device: str) -> None:
    if device in _warned:
        return
    _warned.add(device)
    how = (
        "rebuild leaf_cuda with a CUDA build of torch and the CUDA toolkit (CUDA_HOME)"
        if device == "cuda"
        else "move the tensors to a CPU or a CUDA device"
    )
    warnings.warn(
        f"leaf_cuda has no fused kernel for device '{device}' in this build and runs the PyTorch formula there; "
        f"for the fused kernel, {how}",
        FallbackWarning,
        stacklevel=stacklevel_of_caller(),
    )


def _is_foreign(given: tuple) -> bool:
    """Whether an argument is no tensor, but overrides torch functions as one: torch.fx's Proxy, a tensor-like."""
    return not all(t is None or isinstance(t, Tensor) for t in given) and torch.overrides.has_torch_function(given)


def _as_tensors(function: str, inputs: dict[str, Tensor | None], parameters: tuple) -> dict[str, Tensor | None]:
    """The inputs and the parameters by name. If a parameter is a number, it becomes a tensor in the arithmetic dtype,
    and parameters of u's dtype are converted to that, too: half precision would round the number."""
    optional = ("b", "p2", "p4")
    for name, t in inputs.items():
        if not (isinstance(t, Tensor) or (t is None and name in optional)):
            takes = "a tensor or None" if name in optional else "a tensor"
            raise TypeError(f"{function}: {name} is of type {type(t).__name__}; it takes {takes}")
    tensors = {**inputs, **dict(zip(_ops.PARAMETERS, parameters, strict=True))}
    if all(isinstance(t, Tensor) or (t is None and name in optional) for name, t in tensors.items()):
        return tensors
    u, *_ = inputs.values()
    dtype = arithmetic_dtype(u.dtype)
    for name in _ops.PARAMETERS:
        p = tensors[name]
        symbolic = isinstance(p, (torch.SymInt, torch.SymFloat))
        number = isinstance(p, numbers.Real) and not isinstance(p, bool)
        # While tracing, a number of a Python type may be symbolic as well: it is not compared.
        if name in optional and number and not torch.compiler.is_compiling() and p == 0:
            p = None
        elif symbolic or number:
            try:
                p = torch.full((), p if symbolic else float(p), dtype=dtype, device=u.device)
            except (OverflowError, RuntimeError):  # beyond float64's range, beyond float32's
                raise ValueError(f"{function}: {name} is {p}; it takes a number in the range of {dtype}") from None
        elif isinstance(p, Tensor) and p.dtype == u.dtype:
            p = p.to(dtype)
        elif not (isinstance(p, Tensor) or (p is None and name in optional)):
            takes = "a tensor, a real number or None" if name in optional else "a tensor or a real number"
            raise TypeError(f"{function}: {name} is of type {type(p).__name__}; it takes {takes}")
        tensors[name] = p
    return tensors


def leaf(
    u: Tensor, p1: Tensor | float, p2: Tensor | float | None, p3: Tensor | float, p4: Tensor | float | None
) -> Tensor:
    """The Learnable Extended Activation Function, y = (p1·u + p2)·σ(p3·u) + p4.

    Bodyanskiy & Kostiuk 2023, doi 10.47839/ijc.22.3.3225. Forward and backward are one fused pass each.

    Args:
        u: float64, float32, bfloat16 or float16, of any shape and layout.
        p1, p2, p3, p4: the parameters: tensors that broadcast to u's shape by PyTorch's (right-aligned) rule, all of
            one dtype: u's, or float32 for a bfloat16 or float16 u. A real number stands for a parameter that is not
            trained, None for p2 = 0 or p4 = 0.

    Returns:
        A tensor of u's shape, dtype and layout. Arithmetic is in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: an argument is neither a tensor nor a number, or its dtype does not fit.
        ValueError: a parameter does not broadcast to u, or is on another device.
    """
    if not torch.compiler.is_compiling():
        y = _ops.plain_leaf_forward(u, p1, p2, p3, p4)
        if y is not NotImplemented:
            return y
    given = (u, p1, p2, p3, p4)
    if _is_foreign(given):
        return torch.overrides.handle_torch_function(leaf, given, *given)
    tensors = _as_tensors("leaf", {"u": u}, (p1, p2, p3, p4))
    sharding.prepare(u)
    if needs_reference(u):
        return run_reference("leaf", _ops.leaf_forward, reference.leaf, tensors)
    if needs_autograd_function():
        return LeafFunction.apply(*tensors.values())
    return _ops.leaf_forward(*tensors.values())


def needs_reference(u: Tensor) -> bool:
    """Whether there is no fused kernel for u's device, or a graph of standard operators is wanted."""
    return not _ops.has_kernel(u.device.type) or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())


def run_reference(function: str, operator, formula, tensors: dict[str, Tensor | None], *others):
    """Checks the arguments as ``operator`` does, and returns ``formula(*tensors.values(), *others)``. Warns if that
    stands in for a missing kernel."""
    (first, u), *_ = tensors.items()
    for name, t in tensors.items():
        if t is not None and t.device != u.device:
            raise ValueError(
                f"{function}: {name} is on {t.device}, but {first} is on {u.device}; all tensors take one device"
            )
    arguments = (*tensors.values(), *others)
    with torch.no_grad():  # the checks without the work
        operator(*(t.to("meta") if isinstance(t, Tensor) else t for t in arguments))
    if not _ops.has_kernel(u.device.type):
        _warn_fallback(u.device.type)
    return formula(*arguments)


def leaf_glu(
    a: Tensor,
    b: Tensor | None,
    p1: Tensor | float,
    p2: Tensor | float | None,
    p3: Tensor | float,
    p4: Tensor | float | None,
) -> Tensor:
    """The gated linear unit with LEAF as its gate's activation, y = leaf(a; p1, p2, p3, p4)·b.

    With the parameters of SiLU, (1, 0, 1, 0), it is SwiGLU; with ReLU's ReGLU, with Sigmoid's the GLU of Dauphin et al.
    2017 (Shazeer 2020, "GLU Variants Improve Transformer", arXiv 2002.05202). Forward reads a and b once and writes y,
    backward reads a, b and the gradient once and writes both gradients.

    Args:
        a: the gate, float64, float32, bfloat16 or float16, of any shape and layout; or, where ``b`` is None, a and b side
            by side in the last dimension, (..., 2·H), which is not copied.
        b: of a's shape and dtype, or None.
        p1, p2, p3, p4: as :func:`leaf`'s; they broadcast to the shape of y.

    Returns:
        A tensor of a's shape, or of (..., H), and dtype.

    Raises:
        TypeError: an argument is neither a tensor nor a number, or its dtype does not fit.
        ValueError: a parameter does not broadcast to a, b has another shape, a packed last dimension is odd, or a tensor
            is on another device.
    """
    if not torch.compiler.is_compiling():
        y = _ops.plain_leaf_glu_forward(a, b, p1, p2, p3, p4)
        if y is not NotImplemented:
            return y
    given = (a, b, p1, p2, p3, p4)
    if _is_foreign(given):
        return torch.overrides.handle_torch_function(leaf_glu, given, *given)
    tensors = _as_tensors("leaf_glu", {"a": a, "b": b}, (p1, p2, p3, p4))
    sharding.prepare(a)
    if needs_reference(a):
        return run_reference("leaf_glu", _ops.leaf_glu_forward, reference.leaf_glu, tensors)
    return _ops.leaf_glu_forward(*tensors.values())


def ahaf(u: Tensor, beta: Tensor | float, gamma: Tensor | float) -> Tensor:
    """The Adaptive Hybrid Activation Function, y = β·u·σ(γ·u): LEAF with p1 = β, p3 = γ and p2 = p4 = 0.

    Bodyanskiy & Kostiuk 2022, doi 10.20535/srit.2308-8893.2022.1.07. Arguments and errors as :func:`leaf`'s.
    """
    try:
        return leaf(u, beta, None, gamma, None)
    except (TypeError, ValueError) as error:
        own_names = {"leaf": "ahaf", "p1": "beta", "p3": "gamma"}
        message = re.sub(r"\b(leaf|p1|p3)\b", lambda m: own_names[m[1]], str(error))
        raise type(error)(message) from None
