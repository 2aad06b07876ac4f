"""Everything that only a CUDA machine can show, in one command and well inside ten minutes.

    python benchmarks/gpu_check.py [--results FOLDER] [--quick]

Builds in place for the GPU present, with the torch, ninja and pytest of this Python and without network; runs the tests
that are neither slow nor emulated, compute-sanitizer's memcheck and racecheck on a few of them, and the benchmark; writes
one folder of results. The last lines say what was run, what failed and what could not be run. Exit code: 0 nothing
failed, 1 something did, 3 no GPU.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 3
LIMIT_SECONDS = 540
TEST_PROCESSES = 8

MORE_BENCHMARKS = ("glu", "recurrent")
RESULT_FILES = {"csv": "full.csv", "json": "full.json", "markdown": "full.md"}

# A few tests that reach each CUDA kernel; the checkers slow kernels down a hundredfold.
CHECKED_TESTS = [f"tests/test_{name}.py" for name in ("golden", "double_backward", "glu", "recurrent")]
CHECKED_TESTS += [
    "-k",
    "cuda and (leaf0 or ahaf0 or ((test_float64 or test_packed) and (layer or features)) or (test_formula and 4-3-5))",
]


def gpu_name() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
    return names[0].strip() or None


class Run:
    """Runs the steps, each with a log in the results' folder, and keeps what became of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = time.monotonic()
        self.outcomes: dict[str, str] = {}
        self.missing: set[str] = set()
        self.environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def step(self, name: str, *commands: list[str], seconds: int, **environment: str) -> bool:
        """Runs the commands at the same time."""
        seconds = min(seconds, LIMIT_SECONDS - (time.monotonic() - self.started))
        if seconds < 10:
            self.outcomes[name] = "NOT RUN: no time left"
            return False
        print(f"gpu-check: {name} ...", flush=True)
        begin = time.monotonic()
        processes, outcomes = [], []
        try:
            for command, log in zip(commands, self.logs(name, len(commands)), strict=True):
                with log.open("w") as out:
                    process = subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env={**self.environment, **environment},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                processes.append((process, log.name))
            for process, log in processes:
                try:
                    if code := process.wait(max(0, begin + seconds - time.monotonic())):
                        outcomes.append(f"FAILED with exit code {code}, see {log}")
                except subprocess.TimeoutExpired:
                    outcomes.append(f"STOPPED after {seconds:.0f} s, see {log}")
        finally:
            for process, _ in processes:  # with what they started: it would disturb the next step
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.outcomes[name] = f"{'; '.join(outcomes) or 'ok'} ({time.monotonic() - begin:.0f} s)"
        return not outcomes

    def logs(self, name: str, count: int) -> list[Path]:
        return [self.folder / (f"{name}.log" if count == 1 else f"{name}-{k + 1}.log") for k in range(count)]

    def skip(self, name: str, reason: str) -> None:
        self.outcomes[name] = f"NOT RUN: {reason}"

    def lacks(self, name: str, reason: str) -> None:
        """A step that this machine has no tool for: said, and no failure."""
        self.skip(name, reason)
        self.missing.add(name)


def test_commands(run: Run) -> list[list[str]]:
    """The tests in processes that run at the same time, the longest files in different ones."""
    files = sorted(ROOT.glob("tests/test_*.py"), key=lambda path: path.stat().st_size, reverse=True)
    pytest = [sys.executable, "-m", "pytest", "-m", "not slow and not emulated", "-p", "no:cacheprovider"]
    return [
        [*pytest, f"--junitxml={log.with_suffix('.xml')}", *map(str, files[k::TEST_PROCESSES])]
        for k, log in enumerate(run.logs("tests", TEST_PROCESSES))
    ]


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1].strip("= ") if lines else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/cuda-<device>")
    parser.add_argument("--quick", action="store_true", help="the quick benchmark")
    options = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what was started is ended, too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    device = gpu_name()
    if device is None:
        print("gpu-check: no NVIDIA GPU here (nvidia-smi lists none); nothing was run")
        return NO_GPU
    import torch

    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} cannot use the {device} here; nothing was run")
        return NO_GPU

    folder = (options.results or ROOT / "benchmarks/results" / re.sub(r"\W+", "-", f"cuda {device}").lower()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = {
        "device": device,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or "unknown: not a git checkout",
    }
    (folder / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")

    run = Run(folder)
    python = sys.executable
    run.environment["FORCE_CUDA"] = "1"
    if run.step("build", [python, "setup.py", "build_ext", "--inplace"], seconds=300):
        run.step("tests", *test_commands(run), seconds=240, OMP_NUM_THREADS=str(os.cpu_count() // TEST_PROCESSES or 1))
        checker = shutil.which("compute-sanitizer")
        for tool in ("memcheck", "racecheck"):
            if checker is None:
                run.lacks(tool, "compute-sanitizer is not on PATH")
                continue
            command = [checker, "--tool", tool, "--error-exitcode", "9", python, "-m", "pytest", "-x", *CHECKED_TESTS]
            # Torch's own allocator cuts tensors from large pieces: what is written past one would be in another.
            run.step(tool, command, seconds=90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        quick = ["--quick"] if options.quick else []
        files = [f"--{kind}={folder / name}" for kind, name in RESULT_FILES.items()]
        if run.step("benchmark", [python, "benchmarks/bench_leaf.py", "--device", "cuda", *quick, *files], seconds=300):
            if importlib.util.find_spec("matplotlib"):
                plots = [python, "benchmarks/plots.py", str(folder / RESULT_FILES["json"]), str(folder)]
                run.step("plots", plots, seconds=60)
            else:
                run.lacks("plots", f"matplotlib is missing; `plots.py {RESULT_FILES['json']} .` makes them elsewhere")
        else:
            run.skip("plots", "the benchmark failed")
        for name in MORE_BENCHMARKS:
            table = ["--device", "cuda", "--rounds", "11", f"--markdown={folder / name}.md"]
            run.step(name, [python, f"benchmarks/bench_{name}.py", *table], seconds=60)
    else:
        for name in ("tests", "memcheck", "racecheck", "benchmark", "plots", *MORE_BENCHMARKS):
            run.skip(name, "the build failed")

    summary = [f"{name}: {outcome}" for name, outcome in run.outcomes.items()]
    summary += [f"{log.stem}: {last_line(log)}" for log in run.logs("tests", TEST_PROCESSES)]
    (folder / "summary.txt").write_text("\n".join(summary) + "\n")
    print(
        f"\ngpu-check on {device}, commit {machine['commit'][:12]}, {time.monotonic() - run.started:.0f} s, in {folder}"
    )
    print("\n".join(summary))
    failed = [
        name for name, outcome in run.outcomes.items() if name not in run.missing and not outcome.startswith("ok")
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
