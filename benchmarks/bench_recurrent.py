"""Times a training step of recurrent layers and of cells in a Python loop, forward and backward: leaf_cuda.nn's beside
torch's own and beside the same with LEAF in eager operations.

Each round runs every layer once, in shuffled order; a ratio is the median over the rounds of two times in the same round.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import median

import torch
from bench_leaf import TOLERANCE, at_least, interleaved, parse, print_table, ratio, tqdm
from torch import nn

from leaf_cuda import reference
from leaf_cuda.nn import LeafGRU, LeafGRUCell, LeafLSTM, LeafLSTMCell


class Eager:
    """Computes by the formula in eager operations, step by step."""

    def _compute(self, tensors, batch_sizes, reverse):
        return reference.recurrent(*tensors.values(), batch_sizes, reverse)


class EagerLSTM(Eager, LeafLSTM):
    pass


class EagerGRU(Eager, LeafGRU):
    pass


class EagerLSTMCell(Eager, LeafLSTMCell):
    pass


class EagerGRUCell(Eager, LeafGRUCell):
    pass


class Loop(nn.Module):
    """A cell as a layer: calls it for each step; returns the last state in place of the output."""

    def __init__(self, cell: nn.RNNCellBase):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for step in x:
            state = self.cell(step, state)
        return state if isinstance(state, tuple) else (state,)


KINDS = {
    "LSTM": (nn.LSTM, LeafLSTM, EagerLSTM),
    "GRU": (nn.GRU, LeafGRU, EagerGRU),
    "LSTMCell": (nn.LSTMCell, LeafLSTMCell, EagerLSTMCell),
    "GRUCell": (nn.GRUCell, LeafGRUCell, EagerGRUCell),
}


def seconds(layer, x) -> float:
    """A training step: sets gradients to None, computes the output, runs backward from its sum."""
    start = time.perf_counter()
    layer.zero_grad()
    layer(x)[0].sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def verify(fused, eager, x) -> None:
    """Gives the eager layer the fused one's parameters; raises if output or gradients differ."""
    eager.load_state_dict(fused.state_dict())

    def results(layer):
        y = layer(x)[0]
        return [y.detach(), *torch.autograd.grad(y.sum(), list(layer.parameters()))]

    for got, want in zip(results(fused), results(eager), strict=True):
        r = TOLERANCE[x.dtype]
        torch.testing.assert_close(got, want, rtol=r, atol=r * (x.numel() / x.size(-1)) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=at_least(1), default=128, help="of x")
    parser.add_argument("--hidden", type=at_least(1), default=256)
    parser.add_argument("--batch", type=at_least(1), default=32)
    parser.add_argument("--steps", type=at_least(1), default=64)
    args = parse(parser, rounds=31)

    x = torch.randn(args.steps, args.batch, args.features, device=args.device)
    lines = []
    for kind, (torchs, fused, eager) in KINDS.items():
        layers = {
            f"nn.{kind}": torchs(args.features, args.hidden),
            f"Leaf{kind}": fused(args.features, args.hidden),
            f"Leaf{kind}, per unit": fused(args.features, args.hidden, per_unit=True),
            "eager operations": eager(args.features, args.hidden),
        }
        if kind.endswith("Cell"):
            layers = {name: Loop(cell) for name, cell in layers.items()}
        for layer in layers.values():
            seconds(layer.to(args.device), x)
        verify(layers[f"Leaf{kind}"], layers["eager operations"], x)
        with tqdm(total=args.rounds, desc=kind, unit="round", disable=None) as progress:
            times = interleaved(
                {name: partial(seconds, layer, x) for name, layer in layers.items()}, args.rounds, progress
            )
        others = (f"nn.{kind}", "eager operations")
        for name, own in times.items():
            ratios = ["" if other == name else ratio(own, times[other]) for other in others]
            lines.append([kind, name, f"{1e3 * median(own):.2f}", *ratios])
    headers = ["kind", "layer", "ms", "over torch's", "over eager operations"]
    what = (
        f"Forward and backward, ({args.features}, {args.hidden}), batch {args.batch}, {args.steps} steps, float32, "
        f"{args.rounds} rounds"
    )
    print_table(lines, headers, what, args)


if __name__ == "__main__":
    main()
