"""Plots of the forms that LEAF and AHAF have learned. Needs matplotlib, which is not a dependency of the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .functional import leaf
from .modules import LearnableActivation, check_model, form_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4


def plot_forms(
    model: nn.Module,
    *,
    reference: str | tuple | Callable[[Tensor], Tensor] | None = None,
    samples: int = 16,
    bounds: tuple[float, float] = (-4.0, 4.0),
) -> Figure:
    """Draws y over u for every LEAF and AHAF of a model, one panel each, with its initial form behind.

    Args:
        model: a model, or one LEAF or AHAF. A shared module is drawn once.
        reference: what to draw instead of the initial form: a form as LEAF's ``init_as``, or a function or module, such
            as ``torch.nn.functional.gelu``.
        samples: the maximum number of curves in a panel; of more sets of parameters, evenly spaced ones are drawn.
        bounds: the finite range of u.

    Returns:
        A ``matplotlib.figure.Figure``, not registered with pyplot: ``.savefig("forms.png")`` writes it.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: ``model`` is no module, or ``reference`` a class.
        ValueError: the model has no LEAF or AHAF, or has one on the meta device; or another argument is invalid.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plot_forms takes matplotlib: pip install matplotlib ({error})") from error
    check_model(model)
    layers = {
        (name or type(module).__name__) + of_part: (form, parameters)
        for name, module in model.named_modules()
        if isinstance(module, LearnableActivation)
        for of_part, (form, *parameters) in module.parts().items()
    }
    if not layers:
        raise ValueError("model has no LEAF or AHAF to draw; leaf_cuda.convert.replace_activations puts them in")
    for name, (_, parameters) in layers.items():
        if any(p is not None and p.is_meta for p in parameters):
            raise ValueError(f"model has {name!r} on the meta device; it takes a model whose parameters have values")
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise ValueError(f"samples is {samples!r}; it takes a positive integer")
    if not (isinstance(bounds, Sequence) and len(bounds) == 2 and -math.inf < bounds[0] < bounds[1] < math.inf):
        raise ValueError(f"bounds is {bounds!r}; it takes finite (low, high) with low < high")

    u = torch.linspace(*bounds, 401, dtype=torch.float64, device="cpu")
    columns = min(_COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(0.6 + 3 * columns, 0.6 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (name, (form, parameters)), panel in zip(layers.items(), panels):
        behind, label = _reference(form, reference)
        curves, count = _curves(parameters, u, samples)
        panel.plot(u, behind(u), color="black", linestyle="--", linewidth=1.2, label=label, zorder=3)
        panel.plot(u, curves.T, color="tab:blue", linewidth=1, alpha=max(0.25, 1 / len(curves)))
        shown = f"{count} form{'s' if count > 1 else ''}" if count == len(curves) else f"{len(curves)} of {count} forms"
        panel.set_title(f"{name}: {shown}", fontsize=9, parse_math=False)
        panel.grid(alpha=0.3)
        for text in panel.legend(fontsize=8).get_texts():
            text.set_parse_math(False)
    for panel in list(panels):
        panel.remove()
    figure.supxlabel("u")
    figure.supylabel("y")
    return figure


def _reference(initial, reference) -> tuple[Callable[[Tensor], Tensor], str]:
    if isinstance(reference, type):
        raise TypeError(f"reference is {reference!r}, a class; it takes a form, a function or a module")
    if callable(reference):
        name = getattr(reference, "__name__", type(reference).__name__)
        return lambda u: _in_its_dtype(reference, u), f"reference {name}"
    form = initial if reference is None else reference
    try:
        values = form_values(form)
    except ValueError as error:
        raise ValueError(f"reference takes a function or a form: {error}") from None
    label = form if isinstance(form, str) else str(tuple(form))
    return lambda u: leaf(u, *values), f"{label} at the start" if reference is None else f"reference {label}"


def _in_its_dtype(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """function(u), computed in the dtype and on the device of a module's parameters."""
    like = next(function.parameters(), u) if isinstance(function, nn.Module) else u
    return function(u.to(like)).detach().to(u)


def _curves(parameters: list[Tensor | None], u: Tensor, samples: int) -> tuple[Tensor, int]:
    """y (curves, points) for at most `samples` of the sets of parameters p1 to p4, and how many sets there are."""
    count = parameters[0].numel()
    # In float64: float32 does not hold every index beyond 2^24.
    chosen = torch.linspace(0, count - 1, min(samples, count), dtype=torch.float64, device="cpu").round().long()
    values = [p if p is None else p.detach().flatten()[chosen, None].to("cpu", torch.float64) for p in parameters]
    return leaf(u.expand(len(chosen), -1), *values), count
