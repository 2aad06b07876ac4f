"""The evaluation of Bodyanskiy & Kostiuk 2023 (doi 10.47839/ijc.22.3.3225): networks with LEAF, AHAF and fixed activations.

python examples/paper_experiments.py --quick
python examples/paper_experiments.py --data cifar10 --download --network LeNet5 KerasNet --activation fixed AHAF LEAF \\
    --form ReLU SiLU --procedure standard double-stage slow double-stage-slow
torchrun --nproc-per-node 2 examples/paper_experiments.py ...      DistributedDataParallel; a batch is shared among them

Options with several values make a grid, all of which is trained. If a run was killed, the same command resumes it after
its last complete epoch; on the CPU, its results are those of an uninterrupted run.

Written to the folder --output: for each run RUN.csv (its epochs), RUN.pt (its last state) and RUN-forms.png (what its
activations became); for the command's runs summary.csv, table.md and the curves. Needs
`pip install --no-build-isolation ".[examples]"`, and torchvision for the data that are not bundled.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import io
import itertools
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from leaf_cuda import AHAF, LEAF, fixed_activations, models
from leaf_cuda.optim import DoubleStageTuner, leaf_param_groups
from leaf_cuda.plot import plot_forms

#: The fixed activations that have a LEAF form of the same name, by that name.
FIXED = {fixed.form: kind for kind, fixed in fixed_activations.FIXED.items() if isinstance(fixed.form, str)}
NETWORKS = {"LeNet5": models.LeNet5, "KerasNet": models.KerasNet}
#: The authors' optimizers, with the learning rate of all parameters, and that of p2 and p4 in the slow procedures.
OPTIMIZERS = {
    "adam": (torch.optim.Adam, 1e-3, 1e-6),
    "rmsprop": (partial(torch.optim.RMSprop, alpha=0.9, eps=1e-7), 1e-4, 1e-5),
}
PROCEDURES = ("standard", "double-stage", "slow", "double-stage-slow")
WITHOUT_SLOW = {"slow": "standard", "double-stage-slow": "double-stage"}
TEST_BATCH = 1000


@dataclass(frozen=True)
class Run:
    """The settings that determine a run's result; they are described by the options of the same names."""

    data: str
    network: str
    activation: str
    form: str
    granularity: str
    part: str
    procedure: str
    optimizer: str
    batch: int
    seed: int

    @property
    def name(self) -> str:
        shown = {k: v for k, v in asdict(self).items() if v != "-"}
        return "-".join(map(str, ({**shown, "batch": f"batch{self.batch}", "seed": f"seed{self.seed}"}).values()))

    def meaningful(self) -> Run:
        """The run without settings that mean nothing to its activation: AHAF has no p2 and p4, a fixed one no
        parameters at all."""
        if self.activation == "fixed":
            return replace(self, granularity="-", part="-", procedure="standard")
        if self.activation == "AHAF":
            return replace(self, procedure=WITHOUT_SLOW.get(self.procedure, self.procedure))
        return self


# Data: images in [0, 1], (N, C, H, W) float32, and labels, (N,) int64, for training and for the test.


@dataclass
class Data:
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    flip: bool  # whether a mirrored image is one of the same class

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.train[0].shape[1:])


def digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, 8 by 8 enlarged to 16 by 16, which is the least that both networks take."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        sys.exit(f"--data digits takes scikit-learn ({error}): pip install scikit-learn")
    bundled = load_digits()
    images = torch.from_numpy(bundled.images).float().div(16)[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    labels = torch.from_numpy(bundled.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=bundled.target)
    return Data((images[train], labels[train]), (images[test], labels[test]), flip=False)


def from_torchvision(option: str, name: str, files: str, folder: Path, download: bool) -> Data:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: made for another torch
        sys.exit(
            f"--data {option} takes the torchvision for torch {torch.__version__} ({error}): pip install torchvision"
        )

    def read(train: bool) -> tuple[Tensor, Tensor]:
        dataset = getattr(datasets, name)(folder, train=train, download=download)
        images = torch.as_tensor(dataset.data).float().div(255)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(dataset.targets).long()
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels")
        return images, labels

    try:
        return Data(read(True), read(False), flip=True)
    # What torchvision raises for files that are missing, truncated, or something else, and for a failed download.
    except (RuntimeError, OSError, EOFError, ValueError, AssertionError, pickle.UnpicklingError) as error:
        present = (folder / files).exists()
        if download:
            state, fix = "could not be fetched", "check the network and try again"
        elif present:
            state, fix = "cannot be read", "fetch it anew"
        else:
            state, fix = "is not there", "fetch it"
        remove = f"rm -r {folder / files}; " if present else ""
        sys.exit(
            f"--data {option}: {folder / files} {state} ({type(error).__name__}: {error}); {fix}:\n"
            f"{remove}python {sys.argv[0]} --data {option} --data-folder {folder} --download"
        )


DATA: dict[str, Callable[[Path, bool], Data]] = {
    "digits": lambda folder, download: digits(),
    "fashion-mnist": partial(from_torchvision, "fashion-mnist", "FashionMNIST", "FashionMNIST"),
    "cifar10": partial(from_torchvision, "cifar10", "CIFAR10", "cifar-10-batches-py"),
}


def augment(images: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Moves each image at random by up to 10 % of its height and width, in whole pixels, over a background of 0; if
    `flip`, mirrors each with probability 1/2."""
    n, _, height, width = images.shape
    index = []
    for size in (height, width):
        shift = torch.empty(n, 1).uniform_(-0.1 * size, 0.1 * size, generator=generator).round().long()
        index.append(torch.arange(size) + shift + math.ceil(0.1 * size))
    rows, columns = index
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    margins = [math.ceil(0.1 * size) for size in (width, width, height, height)]
    every = torch.arange(n)[:, None, None]
    return F.pad(images, margins)[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


# Processes: one, or those of torchrun.


@dataclass(frozen=True)
class Processes:
    device: torch.device
    rank: int = 0
    count: int = 1

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.count > 1:
            distributed.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        if self.count > 1:
            distributed.barrier()


@contextlib.contextmanager
def started_processes(device: torch.device) -> Iterator[Processes]:
    if not distributed.is_torchelastic_launched():
        yield Processes(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device, distributed.get_rank(), distributed.get_world_size())
    finally:
        gc.collect()  # free what holds the group, whose threads must end before Python does
        distributed.destroy_process_group()


# Training.


def make_model(run: Run, shape: tuple[int, int, int]) -> nn.Module:
    """The network with its initial weights, which are the same for every activation."""
    if run.activation != "fixed":
        kind = {"LEAF": LEAF, "AHAF": AHAF}[run.activation]
        learned = models.activation(kind, run.granularity, init_as=run.form)
    if run.part != "both":
        if run.form not in FIXED:
            raise ValueError(f"form {run.form} is no fixed activation; it takes --activation LEAF or AHAF, --part both")
        fixed = models.activation(FIXED[run.form])
    torch.manual_seed(run.seed)
    return NETWORKS[run.network](
        shape,
        conv=learned if run.part in ("conv", "both") else fixed,
        fc=learned if run.part in ("fc", "both") else fixed,
    )


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Training:
    def __init__(self, run: Run, data: Data, processes: Processes):
        self.run, self.data, self.processes = run, data, processes
        self.device = processes.device
        self.network = make_model(run, data.shape).to(self.device)
        self.history: list[dict] = []
        make, lr, slow_lr = OPTIMIZERS[run.optimizer]
        slow = run.procedure.endswith("slow")
        weights, *activations = leaf_param_groups(self.network, lr, p24_lr=slow_lr if slow else None)
        if run.procedure.startswith("double-stage"):
            self.optimizers = [make(activations), make([weights])]
            self.tuner = DoubleStageTuner(*self.optimizers)
        else:
            self.optimizers = [make([weights, *activations])]
            self.tuner = None
        self.model = self.network
        if processes.count > 1:
            self.model = DistributedDataParallel(self.network, find_unused_parameters=self.tuner is not None)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        if self.tuner is not None:
            return self.tuner.step(closure)
        (optimizer,) = self.optimizers
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def epoch(self, progress: tqdm) -> None:
        """One pass over the training data, then the test. Its random numbers depend only on the run's seed, the epoch's
        number and the process, so that an interrupted run can be resumed after any epoch."""
        run, rank, count = self.run, self.processes.rank, self.processes.count
        number = len(self.history) + 1
        generator = torch.Generator().manual_seed(seed_of(run.seed, number))  # the same in each process
        torch.manual_seed(seed_of(run.seed, number, rank))  # dropout
        images, labels = self.data.train
        self.model.train()
        start = time.perf_counter()
        total_loss, correct = 0.0, 0
        for batch in torch.randperm(len(labels), generator=generator).split(run.batch):
            # DistributedDataParallel averages the processes' gradients, and their shares may differ in size: hence the
            # factor in closure.
            x = augment(images[batch], self.data.flip, generator)[rank::count].to(self.device)
            target = labels[batch][rank::count].to(self.device)

            def closure():
                nonlocal logits
                logits = self.model(x)
                return F.cross_entropy(logits, target, reduction="sum") * (count / len(batch))

            logits = None
            total_loss += self.step(closure).item() * len(batch) / count
            correct += (logits.argmax(1) == target).sum().item()
            progress.update()
        total_loss, correct = self.processes.sums(total_loss, correct)
        seconds = time.perf_counter() - start
        test_loss, test_accuracy = self.test()
        self.history.append(
            {
                "epoch": number,
                "train_loss": total_loss / len(labels),
                "train_accuracy": correct / len(labels),
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "seconds": seconds,
            }
        )
        progress.set_postfix_str(
            f"loss {total_loss / len(labels):.4f}, test loss {test_loss:.4f}, accuracy {test_accuracy:.2%}"
        )

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        """Loss and accuracy."""
        self.network.eval()
        images, labels = (part[self.processes.rank :: self.processes.count] for part in self.data.test)
        total_loss, correct = 0.0, 0
        for x, target in zip(images.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True):
            logits = self.network(x.to(self.device))
            target = target.to(self.device)
            total_loss += F.cross_entropy(logits, target, reduction="sum").item()
            correct += (logits.argmax(1) == target).sum().item()
        total_loss, correct = self.processes.sums(total_loss, correct)
        count = len(self.data.test[1])
        return total_loss / count, correct / count

    def save(self, path: Path) -> None:
        state = {
            "processes": self.processes.count,
            "history": self.history,
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(path, buffer.getbuffer())

    def load(self, path: Path) -> None:
        count = self.processes.count
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            if state["processes"] != count:
                sys.exit(
                    f"{path} is of {state['processes']} processes, and now there are {count}, which would give another "
                    "result: take as many, or another --output"
                )
            self.network.load_state_dict(state["network"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.history = state["history"]
        except Exception as error:  # of many types: the file may be damaged, of another run, or anything else
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            sys.exit(f"{path} cannot be read ({reason}); to start this run anew: rm {path}")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `path` so that at any moment it holds all of its old content or all of `content`, even if the machine
    stops."""
    partial_file = path.with_name(path.name + ".part")
    with open(partial_file, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial_file, path)


def train(run: Run, data: Data, epochs: int, output: Path, processes: Processes) -> Training:
    """Trains the run until it has `epochs` epochs or more: from its checkpoint if there is one, else from the start."""
    training = Training(run, data, processes)
    checkpoint = output / f"{run.name}.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    processes.wait()
    steps = math.ceil(len(data.train[1]) / run.batch)
    with tqdm(
        total=epochs * steps,
        initial=min(len(training.history), epochs) * steps,
        desc=run.name,
        unit="batch",
        disable=processes.rank > 0 or None,  # None: disabled without a terminal
    ) as progress:
        while len(training.history) < epochs:
            training.epoch(progress)
            if processes.rank == 0:
                training.save(checkpoint)
                write_csv(output / f"{run.name}.csv", training.history)
    training.model = training.network  # DistributedDataParallel holds the processes' group
    return training


# Results.


def best(history: list[dict]) -> dict:
    return max(history, key=lambda row: row["test_accuracy"])  # the first of equals


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def differing(rows: list[dict]) -> list[str]:
    """The keys for which the rows have more than one value, not counting "-"."""
    return [key for key in rows[0] if len({row[key] for row in rows} - {"-"}) > 1]


def table(summary: list[dict]) -> str:
    """Markdown: what all runs have in common, and a line for each."""
    settings = [{key: row[key] for key in (*(field.name for field in fields(Run)), "epochs")} for row in summary]
    columns = differing(settings)
    lines = [
        {
            **{key: row[key] for key in columns},
            "best test accuracy": f"{row['best_test_accuracy']:.2%}",
            "in epoch": row["best_epoch"],
            "s per epoch": f"{row['seconds_per_epoch']:.3g}",
        }
        for row in summary
    ]
    common = {key: row[key] for key in settings[0] if key not in columns for row in settings if row[key] != "-"}
    heading = ", ".join(f"{key} {value}" for key, value in common.items())
    return f"{heading}\n\n{tabulate(lines, headers='keys', tablefmt='github')}\n"


def write_curves(trainings: list[Training], output: Path) -> None:
    """A figure for each data set, network, optimizer and form: loss and accuracy over the epochs."""

    def group(training: Training) -> str:
        run = training.run
        return "-".join((run.data, run.network, run.optimizer, run.form))

    for name, members in itertools.groupby(sorted(trainings, key=group), key=group):
        members = list(members)
        settings = [asdict(training.run) for training in members]
        shown = differing(settings) or ["activation"]
        figure = Figure(figsize=(11, 5.5), layout="constrained")
        for panel, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy")):
            for k, (training, run) in enumerate(zip(members, settings)):
                epochs = [row["epoch"] for row in training.history]
                label = ", ".join(str(run[key]) for key in shown if run[key] != "-")
                for part, style in (("train", ":"), ("test", "-")):
                    values = [row[f"{part}_{quantity}"] for row in training.history]
                    panel.plot(epochs, values, style, color=f"C{k}", label=label if part == "test" else None)
            panel.set(title=f"{quantity}: test, and training dotted", xlabel="epoch", ylabel=quantity)
            panel.grid(alpha=0.3)
            if quantity == "loss":
                panel.set_yscale("log")
        figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
        figure.suptitle(name)
        figure.savefig(output / f"curves-{name}.png", dpi=120)


def write_results(trainings: list[Training], output: Path) -> str:
    """Writes the files of these runs; returns the table."""
    summary = []
    for training in trainings:
        top, history = best(training.history), training.history
        write_csv(output / f"{training.run.name}.csv", history)
        summary.append(
            {
                **asdict(training.run),
                "epochs": len(history),
                "best_test_accuracy": top["test_accuracy"],
                "best_epoch": top["epoch"],
                "seconds_per_epoch": sum(row["seconds"] for row in history) / len(history),
                "processes": training.processes.count,
                "device": torch.cuda.get_device_name() if training.device.type == "cuda" else "cpu",
                "torch": torch.__version__,
            }
        )
        if training.run.activation != "fixed":
            plot_forms(training.network).savefig(output / f"{training.run.name}-forms.png", dpi=120)
    write_csv(output / "summary.csv", summary)
    write_curves(trainings, output)
    text = table(summary)
    write_atomically(output / "table.md", text.encode())
    return text


# Command line.


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def grid(option: str, choices, default, text: str = "") -> None:
        parser.add_argument(option, nargs="+", choices=choices, default=[default], help=f"{text} [{default}]".strip())

    grid("--data", list(DATA), "digits", "digits come with scikit-learn, the others by torchvision")
    grid("--network", list(NETWORKS), "LeNet5")
    grid("--activation", ["fixed", "AHAF", "LEAF"], "LEAF")
    grid("--form", [*FIXED, "CUSTOM"], "SiLU", "of a fixed activation, and the one that LEAF and AHAF start from")
    grid("--granularity", ["layer", "channel", "element"], "element", "of LEAF's and AHAF's parameters")
    grid(
        "--part", ["conv", "fc", "both"], "both", "of the network that gets LEAF or AHAF; the rest keeps the fixed one"
    )
    grid("--procedure", PROCEDURES, "standard", "of LEAF and AHAF; slow: a smaller rate of p2 and p4")
    grid("--optimizer", list(OPTIMIZERS), "adam")
    parser.add_argument("--seed", nargs="+", type=int, default=[42], help="[42]")
    parser.add_argument("--epochs", type=int, default=100, help="[100]; more than before carries a run on")
    parser.add_argument("--batch", type=int, default=128, help="[128], over all processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("experiments"), help="folder for all results [experiments]")
    parser.add_argument("--data-folder", type=Path, default=Path("data"), help="of torchvision's files [data]")
    parser.add_argument("--download", action="store_true", help="fetch the data if they are not in --data-folder")
    parser.add_argument(
        "--quick", action="store_true", help="about a minute: the digits, fixed SiLU and LEAF in each procedure"
    )
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(activation=["fixed", "LEAF"], procedure=PROCEDURES, epochs=40)
        args = parser.parse_args(argv)
    for option, least in (("epochs", 1), ("batch", 1)):
        if getattr(args, option) < least:
            parser.error(f"--{option} is {getattr(args, option)}; it takes an integer from {least}")
    if min(args.seed) < 0:
        parser.error(f"--seed is {min(args.seed)}; it takes integers from 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda; torch.cuda.is_available() is False")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.backends.cudnn.deterministic = True
    values = [getattr(args, field.name) for field in fields(Run)]
    grid = itertools.product(*([v] if isinstance(v, int) else v for v in values))
    runs = []
    for run in dict.fromkeys(Run(*point).meaningful() for point in grid):
        try:
            make_model(run, (1, 16, 16))
            runs.append(run)
        except ValueError as error:
            print(f"left out: {run.name}: {error}", file=sys.stderr)
    if not runs:
        sys.exit("no run is left")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--output is {args.output}; it takes a folder ({error.strerror})")
    with started_processes(torch.device(args.device)) as processes:
        data = {}
        if processes.rank == 0:
            data |= {name: DATA[name](args.data_folder, args.download) for name in args.data}
        processes.wait()  # one process downloads
        if processes.rank > 0:
            data |= {name: DATA[name](args.data_folder, False) for name in args.data}
        trainings = [train(run, data[run.data], args.epochs, args.output, processes) for run in runs]
        if processes.rank == 0:
            print(f"\n{write_results(trainings, args.output)}\nIn {args.output}: table.md, summary.csv, figures.")


if __name__ == "__main__":
    main()
