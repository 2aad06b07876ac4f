"""Times a training iteration of the paper's networks, of a small ResNet and of a small transformer, on images of
CIFAR-10's shape, with LEAF and with fixed activations, in eager and by torch.compile.

An iteration is zero_grad, forward, cross entropy, backward and a step of Adam, over all parameters. Each round runs every
network once, in shuffled order; a ratio is the median over the rounds of two times in the same round.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from statistics import median

import torch
import torch._inductor.config
from bench_leaf import AuthorsWay, at_least, formula, interleaved, parse, print_table, ratio, tqdm
from torch import nn

from leaf_cuda import LEAF
from leaf_cuda.models import KerasNet, LeNet5, activation


class Plain(LEAF):
    def forward(self, u):
        return formula(u, self.p1, self.p2, self.p3, self.p4)


class Authors(LEAF):
    def forward(self, u):
        return AuthorsWay.apply(u, self.p1, self.p2, self.p3, self.p4)


ACTIVATIONS = {
    "SiLU": activation(nn.SiLU),
    "ReLU": activation(nn.ReLU),
    "LEAF per layer": activation(LEAF, "layer", init_as="SiLU"),
    "LEAF per channel": activation(LEAF, "channel", init_as="SiLU"),
    "LEAF per element": activation(LEAF, "element", init_as="SiLU"),
    "plain formula per element": activation(Plain, "element", init_as="SiLU"),
    "authors' way per element": activation(Authors, "element", init_as="SiLU"),
}


#: Those of ACTIVATIONS whose networks are also compiled.
COMPILED = ("SiLU", "LEAF per layer", "LEAF per channel", "LEAF per element")


class ResNet(nn.Module):
    """The stem and two blocks of ResNet-20 (He et al. 2016, section 4.2). Before each activation lie a batch normalisation
    and perhaps an addition, which torch.compile fuses with SiLU, but not with LEAF."""

    def __init__(self, input_shape, *, conv, fc):
        super().__init__()

        def normalised(in_channels):
            return nn.Sequential(nn.Conv2d(in_channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))

        def act():
            return conv((16, *input_shape[1:]))

        self.stem = nn.Sequential(normalised(input_shape[0]), act())
        self.blocks = nn.ModuleList(nn.Sequential(normalised(16), act(), normalised(16)) for _ in range(2))
        self.acts = nn.ModuleList(act() for _ in self.blocks)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        for block, act in zip(self.blocks, self.acts):
            x = act(x + block(x))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """A block for 64 patches of 128 features, with the activation in its MLP of 512 features."""

    def __init__(self, input_shape, *, conv, fc):
        super().__init__()
        self.patches = nn.Conv2d(input_shape[0], 128, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(128, 4, 512, activation=fc((512,)), batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.block(self.patches(x).flatten(2).mT).mean(1))


class Training:
    def __init__(self, network, make, x, target, compiled=False):
        torch.manual_seed(0)
        self.model = network((3, 32, 32), conv=make, fc=make).to(x.device)
        if compiled:
            self.model = torch.compile(self.model, fullgraph=True)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6)
        self.x, self.target = x, target

    def iteration(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.x), self.target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def seconds(self, iterations: int) -> float:
        start = time.perf_counter()
        for _ in range(iterations):
            loss = self.iteration()
        loss.item()
        return (time.perf_counter() - start) / iterations


NETWORKS = (LeNet5, KerasNet, ResNet, Transformer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=at_least(1), default=128)
    parser.add_argument("--iterations", type=at_least(1), default=2, help="per round")
    args = parse(parser, rounds=15)
    torch._inductor.config.fallback_random = True  # dropout draws as in eager

    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    target = torch.randint(10, (args.batch,), device=args.device)
    lines = []
    with tqdm(total=len(NETWORKS) * args.rounds, unit="round", disable=None) as progress:
        for network in NETWORKS:
            torch._dynamo.reset()
            trainings = {name: Training(network, make, x, target) for name, make in ACTIVATIONS.items()}
            for name in COMPILED:
                trainings[f"{name}, compiled"] = Training(network, ACTIVATIONS[name], x, target, compiled=True)
            losses = {}
            for name, training in trainings.items():
                torch.manual_seed(1)  # for dropout
                losses[name] = training.iteration().item()
            for name, loss in losses.items():  # all but ReLU's: same weights, SiLU's form
                if name != "ReLU" and abs(loss - losses["SiLU"]) > 1e-4 * losses["SiLU"]:
                    sys.exit(f"{network.__name__}, {name}: loss {loss}, but {losses['SiLU']} with SiLU")
            runs = {name: partial(training.seconds, args.iterations) for name, training in trainings.items()}
            seconds = interleaved(runs, args.rounds, progress)
            for name, times in seconds.items():
                eager = name.removesuffix(", compiled")
                ratios = ["" if other == name else ratio(times, seconds[other]) for other in ("SiLU", eager)]
                lines.append([network.__name__, name, f"{1e3 * median(times):.1f}", *ratios])
    headers = ["network", "activation", "ms", "over SiLU", "compiled over eager"]
    print_table(lines, headers, f"Batch {args.batch}, {args.rounds} rounds of {args.iterations} iterations", args)


if __name__ == "__main__":
    main()
