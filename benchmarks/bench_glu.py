"""Times the gated unit, forward and backward: leaf_cuda.leaf_glu beside `F.silu(a) * b` and LEAF's formula in eager
operations, of two tensors and of one that packs both.

Each round runs every provider once on each of a few sets of tensors, in shuffled order; a ratio is the median over the
rounds of two times in the same round.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import median

import torch
from bench_leaf import TOLERANCE, at_least, formula, interleaved, parse, print_table, ratio, tqdm

import leaf_cuda

SETS = 4  # together larger than the last-level cache


def silu_gate(a, b, *parameters):
    return torch.nn.functional.silu(a) * b


def plain_gate(a, b, *parameters):
    return formula(a, *parameters) * b


PROVIDERS = {"silu(a)·b": silu_gate, "plain formula·b": plain_gate, "leaf_glu": leaf_cuda.leaf_glu}


def step(gate, packed, parameters, x, halves, g):
    """A training step: sets gradients to None, computes y, runs y.backward(g); returns y."""
    for t in (x, *halves, *parameters):
        t.grad = None
    if not packed:
        a, b = halves
    elif gate is leaf_cuda.leaf_glu:
        a, b = x, None
    else:
        a, b = x.chunk(2, -1)
    y = gate(a, b, *parameters)
    y.backward(g)
    return y


def verify(packed, parameters, x, halves, g) -> None:
    """Raises if y or a gradient of leaf_glu is not the formula's."""

    def results(gate):
        y = step(gate, packed, parameters, x, halves, g)
        return [y.detach(), *(t.grad for t in ([x] if packed else halves)), *(p.grad for p in parameters)]

    for got, want in zip(results(leaf_cuda.leaf_glu), results(plain_gate), strict=True):
        r = TOLERANCE[x.dtype]
        torch.testing.assert_close(got, want, rtol=r, atol=r * (g.numel() / want.numel()) ** 0.5)


def seconds(gate, packed, parameters, sets) -> float:
    start = time.perf_counter()
    for x, halves, g in sets:
        step(gate, packed, parameters, x, halves, g)
    if g.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(sets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=at_least(1), default=4096)
    parser.add_argument("--features", type=at_least(1), default=1024, help="of a, and of b")
    args = parse(parser, rounds=21)

    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        sets = []
        for _ in range(SETS):
            x = torch.randn(args.rows, 2 * args.features, device=args.device).to(dtype)
            halves = [h.contiguous().requires_grad_() for h in x.chunk(2, -1)]
            g = torch.randn(args.rows, args.features, device=args.device).to(dtype)
            sets.append((x.requires_grad_(), halves, g))
        cases = {}
        for count in (1, args.features):
            values = (1.0, 0.0, 1.0, 0.0)  # SiLU's form
            parameters = [torch.full((count,), v, device=args.device).requires_grad_() for v in values]
            for packed in (False, True):
                verify(packed, parameters, *sets[0])
                for name, gate in PROVIDERS.items():
                    cases[name, count, packed] = partial(seconds, gate, packed, parameters, sets)
        for case in cases.values():
            case()
        with tqdm(total=args.rounds, desc=str(dtype), unit="round", disable=None) as progress:
            times = interleaved(cases, args.rounds, progress)
        for (name, count, packed), own in times.items():
            others = ("silu(a)·b", "plain formula·b")
            ratios = ["" if other == name else ratio(own, times[other, count, packed]) for other in others]
            what = [str(dtype).removeprefix("torch."), str(count), "packed" if packed else "two tensors", name]
            lines.append([*what, f"{1e3 * median(own):.2f}", *ratios])
    headers = ["dtype", "parameters", "a and b", "provider", "ms", "over silu(a)·b", "over plain formula·b"]
    shape = f"({args.rows}, 2·{args.features})"
    print_table(lines, headers, f"Forward and backward, {shape}, float32 parameters, {args.rounds} rounds", args)


if __name__ == "__main__":
    main()
