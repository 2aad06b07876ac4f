"""examples/paper_experiments.py: its runs, interruptions, what it writes and prints."""

import csv
import importlib.util
import itertools
import os
import random
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import leaf_cuda

PROGRAM = Path(__file__).parents[1] / "examples" / "paper_experiments.py"
for needed in ("matplotlib", "sklearn", "tabulate", "tqdm"):
    pytest.importorskip(needed)

spec = importlib.util.spec_from_file_location("paper_experiments", PROGRAM)
paper = sys.modules["paper_experiments"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paper)


@pytest.fixture(scope="module", autouse=True)
def few_digits():
    """Runs in this process (not those in processes of their own) train with a part of the data."""
    data = paper.digits()
    few = paper.Data(tuple(t[:301] for t in data.train), tuple(t[:101] for t in data.test), data.flip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(paper.DATA, "digits", lambda folder, download: few)
        yield


def start_program(*arguments, launcher=()):
    path = os.pathsep.join(filter(None, [str(Path(leaf_cuda.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *launcher, PROGRAM, "--device", "cpu", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )


def run_program(output, *options, epochs=2):
    paper.main(["--output", str(output), "--epochs", str(epochs), "--device", "cpu", *options])


def results(folder):
    """The results of the runs in the folder, without the time they took: file → content."""
    checkpoints = {}
    for path in sorted(folder.glob("*.pt")):
        state = torch.load(path, weights_only=True)
        for row in state["history"]:
            del row["seconds"]
        checkpoints[path.name] = state
    assert checkpoints
    return checkpoints


def assert_same(a, b):
    """Bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b) and (not isinstance(a, dict) or list(a) == list(b))
        for x, y in zip(a.values() if isinstance(a, dict) else a, b.values() if isinstance(b, dict) else b):
            assert_same(x, y)
    else:
        assert a == b


# KerasNet has dropout; the two procedures have one and two optimizers.
OPTIONS = ("--network", "KerasNet", "--procedure", "standard", "double-stage-slow", "--batch", "128")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_program(folder, *OPTIONS)
    torch.set_num_threads(threads)
    return results(folder)


class Killed(BaseException):
    pass


def test_resume(tmp_path, uninterrupted, monkeypatch):
    """A run that is killed before, during and after each write of a file, and within epochs, and started again each
    time, has the same results, and repeats only the epochs that were interrupted."""
    replace, fsync, step = os.replace, os.fsync, paper.DoubleStageTuner.step
    epochs = []
    original = paper.Training.epoch
    monkeypatch.setattr(paper.Training, "epoch", lambda self, bar: (original(self, bar), epochs.append(self.run)))

    def killed(countdown):
        """Runs until the countdown-th moment at which this can kill it; returns whether there was such a moment."""
        moments = itertools.count(1)

        def moment():
            if next(moments) == countdown:
                raise Killed

        def half_written(descriptor):
            if next(moments) == countdown:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                raise Killed
            fsync(descriptor)

        def replacing(*paths):
            moment()
            replace(*paths)
            moment()

        def stepping(self, closure):
            moment()
            return step(self, closure)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replacing)
            patch.setattr(os, "fsync", half_written)
            patch.setattr(paper.DoubleStageTuner, "step", stepping)
            try:
                run_program(tmp_path, *OPTIONS)
                return False
            except Killed:
                return True

    # Each start is killed one moment later than the one before, so that all moments of the first epochs are hit.
    for countdown in itertools.count(1):
        if not killed(countdown):
            break
    assert countdown > 9
    assert_same(results(tmp_path), uninterrupted)
    assert not list(tmp_path.glob("*.part"))
    assert len(epochs) <= 4 + countdown  # an interruption costs at most one epoch
    written = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    assert len(written) == 3 and all(len(text.splitlines()) == 3 for text in written.values())


@pytest.mark.slow
def test_kill_at_random(tmp_path):
    """The same with SIGKILL and a new process for each start, which completes one epoch and is killed at a random
    moment of the next."""
    options = (*OPTIONS, "--epochs", "2", "--output")
    assert start_program(*options, tmp_path / "whole").wait() == 0
    epochs = [
        float(row["seconds"])
        for path in (tmp_path / "whole").glob("digits*.csv")
        for row in csv.DictReader(path.open())
    ]
    generator = random.Random(0)
    written = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}  # noqa: E731
    kills = 0
    for _ in range(len(epochs) + 1):
        before = written()
        process = start_program(*options, tmp_path)
        while process.poll() is None and written() == before:
            time.sleep(0.01)
        try:
            assert process.wait(generator.uniform(0, min(epochs))) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills > 0 and process.returncode == 0
    assert_same(results(tmp_path), results(tmp_path / "whole"))


def test_more_epochs(tmp_path, uninterrupted):
    """A run that has ended goes on when more epochs are asked for, and is not repeated when fewer are."""
    run_program(tmp_path, *OPTIONS, epochs=1)
    run_program(tmp_path, *OPTIONS, epochs=2)
    assert_same(results(tmp_path), uninterrupted)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    run_program(tmp_path, *OPTIONS, epochs=1)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}


def test_seed(tmp_path, uninterrupted):
    run_program(tmp_path, "--network", "KerasNet", "--batch", "128", "--seed", "42", "43", epochs=1)
    a, b = results(tmp_path).values()
    assert a["history"] == uninterrupted[next(iter(results(tmp_path)))]["history"][:1]
    assert a["history"] != b["history"]


def test_batches(tmp_path, monkeypatch):
    """Each epoch has every image once, in a new order and moved anew, and draws new dropout."""
    batches, draws = [], []
    augment = paper.augment

    def recording(images, flip, generator):
        moved = augment(images, flip, generator)
        batches.append((images, moved))
        draws.append(torch.get_rng_state())
        return moved

    monkeypatch.setattr(paper, "augment", recording)
    run_program(tmp_path, "--activation", "fixed", "--batch", "301")
    (first, first_moved), (second, second_moved) = batches
    assert not torch.equal(first, second) and not torch.equal(first_moved.sum(0), second_moved.sum(0))
    torch.testing.assert_close(first.sum(0), second.sum(0))
    assert not torch.equal(*draws)


@pytest.mark.slow
def test_processes(tmp_path):
    """Two processes share each batch, and get one process's results up to rounding; 1,437 images leave an odd last
    batch."""
    options = ["--procedure", "standard", "double-stage", "--optimizer", "rmsprop", "--batch", "205", "--epochs", "2"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert start_program(*options, "--output", tmp_path / "two", launcher=torchrun).wait(300) == 0
    assert start_program(*options, "--output", tmp_path / "one").wait(300) == 0
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert list(one) == list(two) and len(one) == 2
    for name in one:
        for key, value in one[name]["network"].items():
            torch.testing.assert_close(two[name]["network"][key], value, rtol=1e-4, atol=1e-5)
        for a, b in zip(one[name]["history"], two[name]["history"], strict=True):
            assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
            assert b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-4)
            assert b["test_accuracy"] == pytest.approx(a["test_accuracy"], abs=1 / 360)
    with pytest.raises(SystemExit, match="is of 2 processes, and now there are 1"):
        paper.main(["--output", str(tmp_path / "two"), *options, "--epochs", "3"])


def test_results(tmp_path, capsys):
    """The table, the CSV files and the figures of a grid; equal runs in it are done once."""
    run_program(
        tmp_path,
        *("--activation", "fixed", "AHAF", "LEAF", "--form", "SiLU", "Tanh", "--granularity", "layer"),
        *("--procedure", "standard", "slow"),
    )
    out, err = capsys.readouterr()
    names = [path.stem for path in tmp_path.glob("digits*.csv")]
    assert sorted(name.removesuffix("-adam-batch128-seed42") for name in names) == [
        "digits-LeNet5-AHAF-SiLU-layer-both-standard",
        "digits-LeNet5-LEAF-SiLU-layer-both-slow",
        "digits-LeNet5-LEAF-SiLU-layer-both-standard",
        "digits-LeNet5-LEAF-Tanh-layer-both-slow",
        "digits-LeNet5-LEAF-Tanh-layer-both-standard",
        "digits-LeNet5-fixed-SiLU-standard",
        "digits-LeNet5-fixed-Tanh-standard",
    ]
    assert "left out: digits-LeNet5-AHAF-Tanh" in err and "no form of AHAF" in err
    summary = list(csv.DictReader((tmp_path / "summary.csv").open()))
    table = (tmp_path / "table.md").read_text()
    assert table in out and table.startswith(
        "data digits, network LeNet5, granularity layer, part both, optimizer adam"
    )
    lines = table.splitlines()[4:]
    assert len(summary) == len(lines) == 7
    for row, line in zip(summary, lines, strict=True):
        name = "-".join(v for k, v in row.items() if k in ("data", "network", "activation", "form") and v)
        path = next(p for p in tmp_path.glob(f"{name}*-{row['procedure']}-adam*.csv"))
        epochs = list(csv.DictReader(path.open()))
        assert [e["epoch"] for e in epochs] == ["1", "2"] and all(float(e["seconds"]) > 0 for e in epochs)
        top = max(epochs, key=lambda e: float(e["test_accuracy"]))
        assert (row["best_test_accuracy"], row["best_epoch"]) == (top["test_accuracy"], top["epoch"])
        assert float(row["seconds_per_epoch"]) == pytest.approx(sum(float(e["seconds"]) for e in epochs) / 2)
        assert f"{float(top['test_accuracy']):.2%}" in line and row["activation"] in line
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert (
        len(figures) == 2 + 5 and {"curves-digits-LeNet5-adam-SiLU.png", "curves-digits-LeNet5-adam-Tanh.png"} < figures
    )


def test_quick(tmp_path):
    paper.main(["--quick", "--epochs", "1", "--output", str(tmp_path)])
    assert len(list(tmp_path.glob("*.pt"))) == 5


def test_parts_and_procedures():
    """Where LEAF is in the network, and which parameters are trained at which rate, in one stage or two."""
    data = paper.digits()
    run = paper.Run("digits", "LeNet5", "LEAF", "Tanh", "channel", "conv", "double-stage-slow", "adam", 128, 0)
    training = paper.Training(run, data, paper.Processes(torch.device("cpu")))
    network = training.network
    assert [type(network.get_submodule(f"act{k}")) for k in (1, 2, 3)] == [leaf_cuda.LEAF] * 2 + [torch.nn.Tanh]
    assert network.act1.size == (20, 1, 1)
    activations, weights = ({g["name"]: g["lr"] for g in o.param_groups} for o in training.optimizers)
    assert activations == {"activations": 1e-3, "p2 and p4": 1e-6} and weights == {"weights": 1e-3}
    run = paper.replace(run, part="fc", procedure="standard", optimizer="rmsprop")
    training = paper.Training(run, data, paper.Processes(torch.device("cpu")))
    assert [type(training.network.get_submodule(f"act{k}")) for k in (1, 2, 3)] == [torch.nn.Tanh] * 2 + [
        leaf_cuda.LEAF
    ]
    (optimizer,) = training.optimizers
    assert [(g["name"], g["lr"], g["alpha"], g["eps"]) for g in optimizer.param_groups] == [
        ("weights", 1e-4, 0.9, 1e-7),
        ("activations", 1e-4, 0.9, 1e-7),
    ]


def test_digits():
    data = paper.digits()
    assert data.shape == (1, 16, 16) and not data.flip
    for (images, labels), count in ((data.train, 1437), (data.test, 360)):
        assert len(images) == len(labels) == count and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.min() == 0 and images.max() == 1
        assert labels.bincount(minlength=10).min() > 0.09 * count
    from sklearn.datasets import load_digits

    small = torch.cat([data.train[0], data.test[0]])[:, 0, ::2, ::2].mul(16).flatten(1)
    bundled = torch.from_numpy(load_digits().data).float()
    order = lambda rows: sorted(map(tuple, rows.tolist()))  # noqa: E731
    assert order(small) == order(bundled)


@pytest.mark.parametrize("flip", [False, True])
def test_augment(flip):
    """Each image is the original, moved and mirrored in one of the possible ways, and all of them occur."""
    images = torch.rand(1, 2, 20, 15).expand(600, 2, 20, 15)
    result = paper.augment(images, flip, torch.Generator().manual_seed(0))
    ways = {}
    for dy, dx, mirrored in itertools.product((-2, -1, 0, 1, 2), (-2, -1, 0, 1, 2), (False, True)):
        moved = np.zeros((2, 20, 15), np.float32)
        source = images[0].numpy()[:, :, ::-1] if mirrored else images[0].numpy()
        for y, x in itertools.product(range(20), range(15)):
            if 0 <= y + dy < 20 and 0 <= x + dx < 15:
                moved[:, y, x] = source[:, y + dy, x + dx]
        ways[moved.tobytes()] = (dy, dx, mirrored)
    seen = {ways[image.numpy().tobytes()] for image in result}
    # A shift along x of at most 1.5 pixels rounds to -2 and 2 only at its very ends.
    assert seen >= set(itertools.product((-2, -1, 0, 1, 2), (-1, 0, 1), (False, True) if flip else (False,)))
    assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})


def fake_torchvision(monkeypatch, dataset):
    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(CIFAR10=dataset, FashionMNIST=dataset)
    monkeypatch.setitem(sys.modules, "torchvision", module)


class Bundled:
    """Data as torchvision has them: CIFAR-10 as a NumPy array (N, H, W, C) and a list, Fashion-MNIST as tensors (N, H,
    W)."""

    def __init__(self, root, train, download):
        n = 40 if train else 20
        self.data = np.arange(n * 32 * 32 * 3, dtype=np.uint8).reshape(n, 32, 32, 3)
        self.targets = [k % 10 for k in range(n)]


def test_torchvision(monkeypatch, tmp_path):
    fake_torchvision(monkeypatch, Bundled)
    data = paper.DATA["cifar10"](tmp_path, False)
    assert data.shape == (3, 32, 32) and data.flip and len(data.train[0]) == 40 and len(data.test[1]) == 20
    torch.testing.assert_close(
        data.train[0][3, 1, 5, 7], torch.tensor(Bundled(0, True, 0).data[3, 5, 7, 1] / 255).float()
    )

    class Grey(Bundled):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.data, self.targets = torch.from_numpy(self.data[..., 0]), torch.tensor(self.targets)

    fake_torchvision(monkeypatch, Grey)
    assert paper.DATA["fashion-mnist"](tmp_path, False).shape == (1, 32, 32)


def test_data_errors(monkeypatch, tmp_path):
    """The message names what is missing, and the command that fetches it."""
    read = paper.DATA["cifar10"]
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit, match="cifar10 takes the torchvision for torch .*: pip install torchvision"):
        read(tmp_path, False)

    def failing(error):
        def dataset(root, train, download):
            raise error

        fake_torchvision(monkeypatch, dataset)

    failing(RuntimeError("Dataset not found or corrupted."))
    with pytest.raises(SystemExit, match=r"is not there .*fetch it:\npython .* --data cifar10 .*--download"):
        read(tmp_path, False)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for error in (RuntimeError("corrupted"), EOFError("Ran out of input"), ValueError("invalid literal")):
        failing(error)
        with pytest.raises(SystemExit, match=r"cannot be read .*\nrm -r .*cifar-10-batches-py; python .*--download"):
            read(tmp_path, False)
    failing(OSError("no route to host"))
    with pytest.raises(SystemExit, match=r"could not be fetched \(OSError: no route to host\)"):
        read(tmp_path, True)

    class Fewer(Bundled):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.targets.pop()

    fake_torchvision(monkeypatch, Fewer)
    with pytest.raises(SystemExit, match="40 images and 39 labels"):
        read(tmp_path, False)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="takes scikit-learn .*: pip install scikit-learn"):
        paper.digits()


def test_damaged_checkpoint(tmp_path):
    run_program(tmp_path, epochs=1)
    (path,) = tmp_path.glob("*.pt")
    path.write_bytes(path.read_bytes()[:1000])
    message = f"^.*{path.name} cannot be read .* to start this run anew: rm .*{path.name}$"
    with pytest.raises(SystemExit, match=message):
        run_program(tmp_path, epochs=1)
    another = {"processes": 1, "history": [], "network": {"conv1.weight": torch.ones(2)}, "optimizers": []}
    for wrong in ({}, {"processes": 1}, [1, 2], another, {**another, "network": 3}):
        torch.save(wrong, path)
        with pytest.raises(SystemExit, match=message):
            run_program(tmp_path, epochs=1)


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="--output is .*file; it takes a folder"):
        run_program(tmp_path / "file")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--epochs", "0"], "--epochs is 0; it takes an integer from 1"),
        (["--batch", "0"], "--batch is 0; it takes an integer from 1"),
        (["--seed", "-1"], "--seed is -1; it takes integers from 0"),
        (["--form", "Swish"], "argument --form: invalid choice: 'Swish'"),
        (["--activation", "fixed", "--form", "CUSTOM"], "form CUSTOM is no fixed activation"),
        (["--activation", "AHAF", "--form", "Tanh"], "no form of AHAF"),
    ],
)
def test_errors(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        paper.main(["--output", str(tmp_path / "new"), *options])
    assert error.value.code != 0 and message in capsys.readouterr().err and not (tmp_path / "new").exists()
