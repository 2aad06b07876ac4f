"""Times a training step of recurrent layers, forward and backward: leaf_cuda.nn's beside torch's own and beside the same
layer with LEAF in eager operations.

Each round runs every layer once, in shuffled order; a ratio is the median over the rounds of two times in the same round.
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median

import torch
from bench_leaf import at_least, parse, print_table, ratio, tqdm
from torch import nn

from leaf_cuda import reference
from leaf_cuda.nn import LeafGRU, LeafLSTM


class Eager:
    """The formula of a layer's step in eager operations, step by step."""

    def _run(self, suffix, x, states, batch_sizes, reverse):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        h, c = states if len(states) == 2 else (*states, None)
        leaf = getattr(self, "leaf" + suffix)
        weights = [getattr(self, name + suffix, None) for name in names]
        return reference.recurrent(x, h, c, *weights, leaf.p1, leaf.p2, leaf.p3, leaf.p4, batch_sizes, reverse)


class EagerLSTM(Eager, LeafLSTM):
    pass


class EagerGRU(Eager, LeafGRU):
    pass


KINDS = {"LSTM": (nn.LSTM, LeafLSTM, EagerLSTM), "GRU": (nn.GRU, LeafGRU, EagerGRU)}


def seconds(layer, x) -> float:
    """A training step: gradients to None, output, backward of its sum."""
    start = time.perf_counter()
    layer.zero_grad()
    layer(x)[0].sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
        times = {name: [] for name in layers}
        for layer in layers.values():
            seconds(layer.to(args.device), x)
        for _ in tqdm(range(args.rounds), desc=kind, unit="round", disable=None):
            for name in random.sample(list(layers), len(layers)):
                times[name].append(seconds(layers[name], x))
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
