"""Handwritten digits, read row by row: a recurrent layer with fixed sigmoids and tanhs against one with LEAF instead.

python examples/sequence_classification.py
python examples/sequence_classification.py --kind GRU --per-unit --seed 0 1 2

scikit-learn's 1,797 digits of 8 rows of 8 pixels are sequences of 8 steps; the last state goes to a linear layer. Both
layers start from the same weights and see the same batches. Takes about a minute on two CPU cores; needs
`pip install --no-build-isolation ".[examples]"`.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import mean

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from leaf_cuda.nn import LeafGRU, LeafLSTM
from leaf_cuda.optim import leaf_param_groups

LAYERS = {"LSTM": (nn.LSTM, LeafLSTM), "GRU": (nn.GRU, LeafGRU)}


class Classifier(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size, 10)

    def forward(self, rows: Tensor) -> Tensor:
        output, _ = self.layer(rows)
        return self.head(output[:, -1])


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test sequences, (N, 8, 8) in [0, 1], and their labels."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        sys.exit(f"the digits take scikit-learn ({error}): pip install scikit-learn")
    bundled = load_digits()
    parts = train_test_split(
        bundled.images / 16, bundled.target, test_size=360, random_state=0, stratify=bundled.target
    )
    x, x_test, y, y_test = map(torch.from_numpy, parts)
    return x.float(), y.long(), x_test.float(), y_test.long()


def train(model: Classifier, data: tuple[Tensor, ...], args: argparse.Namespace, seed: int) -> tuple[float, float]:
    """(accuracy on the test digits in percent, seconds of training)"""
    x, y, x_test, y_test = data
    optimizer = torch.optim.Adam(leaf_param_groups(model, lr=args.lr))
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for _ in tqdm(
        range(args.epochs), desc=f"{type(model.layer).__name__}, seed {seed}", unit="epoch", leave=False, disable=None
    ):
        for batch in torch.randperm(len(x), generator=generator).split(args.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    return 100 * accuracy, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--per-unit", action="store_true", help="LEAF's parameters per hidden unit, not per gate")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    data, lines = digits(), []
    for kind in args.kind:
        fixed, learned = LAYERS[kind]
        accuracies, times = {fixed: [], learned: []}, {fixed: [], learned: []}
        for seed in args.seed:
            torch.manual_seed(seed)
            plain = Classifier(fixed(8, args.hidden, batch_first=True))
            leaf = Classifier(learned(8, args.hidden, batch_first=True, per_unit=args.per_unit))
            leaf.load_state_dict(plain.state_dict())
            for of_layer, model in ((fixed, plain), (learned, leaf)):
                accuracy, seconds = train(model, data, args, seed)
                accuracies[of_layer].append(accuracy)
                times[of_layer].append(seconds)
        for layer in (fixed, learned):
            each = ", ".join(f"{a:.1f}" for a in accuracies[layer])
            lines.append([layer.__name__, f"{mean(accuracies[layer]):.1f}", each, f"{mean(times[layer]):.1f}"])
    print(tabulate(lines, ["layer", "accuracy %", "of each seed", "seconds"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
