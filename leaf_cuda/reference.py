"""LEAF in plain PyTorch: what runs on devices without a fused kernel, and what an ONNX graph is made of."""

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


def recurrent(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    p1: Tensor,
    p2: Tensor,
    p3: Tensor,
    p4: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """One recurrent layer, of an LSTM or, without c, of a GRU → output, h_n and, of an LSTM, c_n. See recurrent.py."""
    math = torch.promote_types(x.dtype, torch.float32)

    def act(u: Tensor, row: int) -> Tensor:
        return _in_math(u, p1[row], p2[row], p3[row], p4[row])

    by_x = torch.nn.functional.linear(x, weight_ih, bias_ih)
    if batch_sizes is None:  # the batch size is not read, since it may vary in an exported graph
        steps = by_x.unbind()
    else:
        sizes = batch_sizes.tolist()
        if sizes[:1] != [len(h)] or any(b > a or b < 1 for a, b in zip(sizes, sizes[1:])):
            raise ValueError(f"batch_sizes is {sizes}; it takes sizes that never grow, from h's batch, {len(h)}, on")
        steps = by_x.split(sizes)

    def of_step(state: Tensor, t: int) -> Tensor:
        return state if batch_sizes is None else state[: sizes[t]]

    def after_step(new: Tensor, state: Tensor, t: int) -> Tensor:
        return new if batch_sizes is None else torch.cat([new, state[sizes[t] :]])

    outputs = [h] * len(steps)
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        state = of_step(h, t)
        through = torch.nn.functional.linear(state, weight_hh, bias_hh)
        if c is not None:
            i, f, g, o = (steps[t] + through).to(math).chunk(4, -1)
            cell = act(f, 1) * of_step(c, t) + act(i, 0) * act(g, 2)
            new = (act(o, 3) * act(cell, 4)).to(x.dtype)
            c = after_step(cell.to(x.dtype), c, t)
        else:
            (r, z, m), (r_x, z_x, n_x) = through.chunk(3, -1), steps[t].chunk(3, -1)
            candidate = act((n_x.to(math) + act((r_x + r).to(math), 0) * m), 2)
            new = (candidate + act((z_x + z).to(math), 1) * (state - candidate)).to(x.dtype)
        h = after_step(new, h, t)
        outputs[t] = new
    output = torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)
    return (output, h) if c is None else (output, h, c)


def _in_math(u: Tensor, p1: Tensor, p2: Tensor | None, p3: Tensor, p4: Tensor | None) -> Tensor:
    math = torch.promote_types(u.dtype, torch.float32)

    def in_math(p: Tensor) -> Tensor:
        extra = max(0, p.dim() - u.dim())  # leading 1s beyond u's dimensions, which y does not get
        return (p.reshape(p.shape[extra:]) if extra else p).to(math)

    x = u.to(math)
    line = in_math(p1) * x
    if p2 is not None:
        line = line + in_math(p2)
    y = line * torch.sigmoid(in_math(p3) * x)
    if p4 is not None:
        y = y + in_math(p4)
    return y
