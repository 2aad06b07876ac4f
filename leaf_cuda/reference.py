"""LEAF as plain PyTorch: what runs on devices without a fused kernel, and what an exported graph is made of."""

from __future__ import annotations

import torch
from torch import Tensor


def leaf(u: Tensor, p1: Tensor, p2: Tensor | None, p3: Tensor, p4: Tensor | None) -> Tensor:
    """(p1·u + p2)·σ(p3·u) + p4 in float32 for float16 and bfloat16, else in u's dtype; rounded once, to u's dtype."""
    return _in_math(u, p1, p2, p3, p4).to(u.dtype)


def leaf_glu(a: Tensor, b: Tensor | None, p1: Tensor, p2: Tensor | None, p3: Tensor, p4: Tensor | None) -> Tensor:
    """leaf(a)·b, rounded once as :func:`leaf`; without b, a and b lie side by side in a's last dimension."""
    if b is None:
        a, b = a.chunk(2, -1)
    return (_in_math(a, p1, p2, p3, p4) * b).to(a.dtype)


def _in_math(u: Tensor, p1: Tensor, p2: Tensor | None, p3: Tensor, p4: Tensor | None) -> Tensor:
    math = torch.promote_types(u.dtype, torch.float32)

    def in_math(p: Tensor) -> Tensor:
        extra = max(0, p.dim() - u.dim())  # leading 1s beyond u's dimensions, which y has not either
        return (p.reshape(p.shape[extra:]) if extra else p).to(math)

    x = u.to(math)
    line = in_math(p1) * x
    if p2 is not None:
        line = line + in_math(p2)
    y = line * torch.sigmoid(in_math(p3) * x)
    if p4 is not None:
        y = y + in_math(p4)
    return y
