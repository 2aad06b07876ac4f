"""Everything that only a CUDA machine can show, in one command and well inside ten minutes.

    python benchmarks/gpu_check.py [--results FOLDER] [--quick]

Builds in place for the GPU present, with the torch, ninja, numpy and pytest of this Python and without network; runs the
tests that are neither slow nor emulated, the benchmarks, and compute-sanitizer's memcheck and racecheck on a few tests;
writes one folder of results. The last lines say what was run, what failed and what could not be run. Exit code: 0 nothing
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
NO_TESTS = 5  # pytest's exit code if a file has none of the selected tests
LIMIT_SECONDS = 540
LEAST_SECONDS = 10  # with less left, a step is not begun
TEST_PROCESSES = 8

# Rows enough that the GPU takes longer for a step than Python does.
MORE_BENCHMARKS = {"glu": ["--rows", "65536"], "recurrent": []}
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
    """Runs the steps, each with a log, and keeps their outcomes."""

    def __init__(self, folder: Path):
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        self.outcomes: dict[str, str] = {}
        self.missing: set[str] = set()
        self.environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def step(
        self,
        name: str,
        commands: dict[str, list[str]],
        seconds: float,
        at_once: int = 1,
        good_codes: tuple[int, ...] = (0,),
        **environment: str,
    ) -> bool:
        """Runs the commands, `at_once` at a time, each with a log of its name. Returns whether all succeeded."""
        seconds = min(seconds, LIMIT_SECONDS - (time.monotonic() - self.started))
        if seconds < LEAST_SECONDS:
            self.outcomes[name] = "NOT RUN: no time left"
            return False
        print(f"gpu-check: {name} ...", flush=True)
        begin = time.monotonic()
        waiting, running, outcomes = list(commands.items()), {}, []
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    log, command = waiting.pop(0)
                    running[log] = self.start(log, command, environment)
                for log, process in list(running.items()):
                    if process.poll() is not None:
                        self.end(running.pop(log))
                        if process.returncode not in good_codes:
                            outcomes.append(f"FAILED with exit code {process.returncode}, see {log}.log")
                if time.monotonic() > begin + seconds:
                    late = ", ".join([*running, *dict(waiting)])
                    outcomes += [f"STOPPED after {seconds:.0f} s: {late}"] if late else []
                    break
                time.sleep(0.05)
        finally:
            for process in running.values():
                self.end(process)
        self.outcomes[name] = f"{'; '.join(outcomes) or 'ok'} ({time.monotonic() - begin:.0f} s)"
        return not outcomes

    def start(self, log: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
        with (self.logs / f"{log}.log").open("w") as out:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @staticmethod
    def end(process: subprocess.Popen) -> None:
        """Kills the process and what it started, which would disturb the next step."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def skip(self, name: str, reason: str) -> None:
        self.outcomes[name] = f"NOT RUN: {reason}"

    def lacks(self, name: str, reason: str) -> None:
        """Records a step that this machine has no tool for, which is no failure."""
        self.skip(name, reason)
        self.missing.add(name)


def test_commands(folder: Path) -> dict[str, list[str]]:
    """A process for each file of tests, by name; the large files first."""
    files = sorted(ROOT.glob("tests/test_*.py"), key=lambda path: path.stat().st_size, reverse=True)
    pytest = [sys.executable, "-m", "pytest", "-m", "not slow and not emulated", "-p", "no:cacheprovider"]
    return {file.stem: [*pytest, f"--junitxml={folder / file.stem}.xml", str(file)] for file in files}


def commit() -> str:
    """The checkout's commit, if this is a checkout and git is installed."""
    with contextlib.suppress(OSError):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        if head:
            return head
    return "unknown: not a git checkout, or no git"


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/cuda-<device>")
    parser.add_argument("--quick", action="store_true", help="the quick benchmark")
    options = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGHUP):  # so that started processes are killed, too
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
    machine = {
        "device": device,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
    }
    (folder / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")

    # Remove an earlier run's results.
    shutil.rmtree(folder / "logs", ignore_errors=True)
    tables = [f"{name}.md" for name in MORE_BENCHMARKS]
    for path in (*map(folder.joinpath, (*RESULT_FILES.values(), *tables, "summary.txt")), *folder.glob("*.png")):
        path.unlink(missing_ok=True)

    run = Run(folder)
    python = sys.executable
    run.environment["FORCE_CUDA"] = "1"
    tests = test_commands(run.logs)
    full = folder / RESULT_FILES["json"]
    build = [python, "setup.py", "build_ext", "--inplace"]
    if run.step("build", {"build": build}, seconds=300, NVCC_APPEND_FLAGS="-lineinfo"):  # for compute-sanitizer
        threads = str(os.cpu_count() // TEST_PROCESSES or 1)
        codes = (0, NO_TESTS)
        run.step("tests", tests, seconds=180, at_once=TEST_PROCESSES, good_codes=codes, OMP_NUM_THREADS=threads)
        # Few rounds, since a GPU's times vary little: most of the time is torch.compile's.
        bench = [python, "benchmarks/bench_leaf.py", "--device", "cuda", "--rounds", "5"]
        bench += ["--quick"] if options.quick else []
        bench += [f"--{kind}={folder / name}" for kind, name in RESULT_FILES.items()]
        run.step("benchmark", {"benchmark": bench}, seconds=240)
        if not full.exists():  # it is written after each case
            run.skip("plots", "the benchmark has no results")
        elif importlib.util.find_spec("matplotlib"):
            run.step("plots", {"plots": [python, "benchmarks/plots.py", str(full), str(folder)]}, seconds=60)
        else:
            run.lacks("plots", f"matplotlib is missing; `plots.py {full.name} .` makes them elsewhere")
        for name, own in MORE_BENCHMARKS.items():
            table = ["--device", "cuda", "--rounds", "7", f"--markdown={folder / name}.md", *own]
            run.step(name, {name: [python, f"benchmarks/bench_{name}.py", *table]}, seconds=60)
        checker = shutil.which("compute-sanitizer")
        for tool in ("memcheck", "racecheck"):
            if checker is None:
                run.lacks(tool, "compute-sanitizer is not on PATH")
                continue
            check = [checker, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=9leaf_cuda"]
            # torch's caching allocator cuts tensors from large blocks: a write past one tensor would land in another.
            run.step(
                tool,
                {tool: [*check, python, "-m", "pytest", "-x", *CHECKED_TESTS]},
                seconds=90,
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
    else:
        for name in ("tests", "benchmark", "plots", *MORE_BENCHMARKS, "memcheck", "racecheck"):
            run.skip(name, "the build failed")

    summary = [f"{name}: {outcome}" for name, outcome in run.outcomes.items()]
    logs = {name: run.logs / f"{name}.log" for name in tests}
    summary += [f"{name}: {last_line(log)}" for name, log in logs.items() if log.exists()]
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
