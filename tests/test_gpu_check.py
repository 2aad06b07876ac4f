"""How `make gpu-check` runs its steps: it reports what failed, hung or could not begin, and leaves no process
running."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks/gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LEAST_SECONDS", 0)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_outcomes(gpu_check, tmp_path):
    run = gpu_check.Run(tmp_path)
    assert run.step("good", {"a": python("print(1)"), "b": python("exit(5)")}, seconds=60, good_codes=(0, 5))
    assert not run.step("bad", {"c": python("exit(5)"), "d": python("print(2)")}, seconds=60)
    run.lacks("tool", "it is not here")
    assert run.outcomes["good"].startswith("ok (") and run.outcomes["bad"].startswith(
        "FAILED with exit code 5, see c.log ("
    )
    assert run.outcomes["tool"] == "NOT RUN: it is not here" and run.missing == {"tool"}
    assert gpu_check.last_line(tmp_path / "logs/d.log") == "2"


def test_what_hangs_is_stopped_with_its_children(gpu_check, tmp_path):
    run = gpu_check.Run(tmp_path)
    started = tmp_path / "started"
    child = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    hangs = python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    assert not run.step("step", {"hangs": hangs, "waits": python("")}, seconds=5)
    assert run.outcomes["step"].startswith("STOPPED after 5 s: hangs, waits (")
    child = Path("/proc", started.read_text())
    deadline = time.monotonic() + 10
    while child.exists() and "zombie" not in (child / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists() or "zombie" in (child / "status").read_text()


def test_so_many_at_a_time(gpu_check, tmp_path):
    run = gpu_check.Run(tmp_path)
    code = "import time; print(time.time()); time.sleep(0.5); print(time.time())"
    assert run.step("step", {name: python(code) for name in "abc"}, seconds=60, at_once=2)
    times = [sorted(map(float, (tmp_path / f"logs/{name}.log").read_text().split())) for name in "abc"]
    together = sum(
        a[0] < b[1] and b[0] < a[1] for a, b in [(times[0], times[1]), (times[0], times[2]), (times[1], times[2])]
    )
    assert 1 <= together < 3


def test_no_time_left(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 10)
    monkeypatch.setattr(gpu_check, "LIMIT_SECONDS", 5)
    run = gpu_check.Run(tmp_path)
    assert not run.step("late", {"late": python("")}, seconds=60)
    assert run.outcomes["late"] == "NOT RUN: no time left"


def test_without_a_gpu():
    """It says so, and exits with a code for that alone."""
    done = subprocess.run([sys.executable, str(FILE)], capture_output=True, text=True, env={"PATH": "/nowhere"})
    assert done.returncode == 3 and done.stdout == (
        "gpu-check: no NVIDIA GPU here (nvidia-smi lists none); nothing was run\n"
    )
