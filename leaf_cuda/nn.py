"""Gated units with LEAF inside, and recurrent layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ._types import Device, Form, Size
from .functional import arithmetic_dtype, leaf_glu
from .modules import FourParameters, graph_call, has_all_but_leaf_parameters
from .recurrent import CellLEAF, LeafGRU, LeafGRUCell, LeafLSTM, LeafLSTMCell

__all__ = ["CellLEAF", "LeafGLU", "LeafGRU", "LeafGRUCell", "LeafLSTM", "LeafLSTMCell", "LeafMLP"]


class LeafGLU(FourParameters):
    """The gated linear unit with LEAF as its gate's activation, y = leaf(a)·b, with trained p1, p2, p3 and p4.

    It begins as SwiGLU; as ReGLU with ``init_as="ReLU"``, as the plain GLU with "Sigmoid". See
    :func:`leaf_cuda.leaf_glu`. Arguments and errors as :class:`leaf_cuda.LEAF`'s; ``size`` broadcasts to y's shape: (1,)
    for one set of parameters, (H,) for one per feature.
    """

    def __init__(self, *, init_as: Form = "SiLU", **kwargs: Any):
        super().__init__(init_as=init_as, **kwargs)

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """y, (..., H), from a and b of that shape; or from ``a`` alone, (..., 2·H), with a and b side by side in it."""
        if isinstance(a, Proxy) and (call := graph_call(self, LeafGLU, a, b)) is not None:
            return call
        return leaf_glu(a, b, self.p1, self.p2, self.p3, self.p4)


class LeafMLP(nn.Module):
    """The gated MLP of LLaMA with a :class:`LeafGLU`: down_proj(leaf(gate_proj(x))·up_proj(x)), from (..., hidden_size)
    to the same shape.

    A state dict of LLaMA's own MLP (``gate_proj``, ``up_proj``, ``down_proj``) loads with strict=True: LEAF's parameters,
    ``act_fn.p1`` ... ``act_fn.p4``, then have their initial form.

    Args:
        hidden_size, intermediate_size: number of features of x, and between the projections.
        size: of LEAF's parameters, (1,) or (intermediate_size,).
        init_as: LEAF's initial form; "SiLU" is LLaMA's own activation.
        bias: whether the projections have one.
        device, dtype: of the projections' weights. LEAF's parameters are in float32, or float64 if the weights are.

    Raises:
        TypeError, ValueError: as :class:`leaf_cuda.LEAF`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        size: Size = (1,),
        init_as: Form = "SiLU",
        bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        like = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **like)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **like)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **like)
        self.act_fn = LeafGLU(
            size=size, init_as=init_as, device=device, dtype=arithmetic_dtype(self.gate_proj.weight.dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x), self.up_proj(x)))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if has_all_but_leaf_parameters(self, state_dict, prefix):
            self.act_fn.add_initial_values(state_dict, f"{prefix}act_fn.", state_dict.get(f"{prefix}gate_proj.weight"))
        super()._load_from_state_dict(state_dict, prefix, *args)
