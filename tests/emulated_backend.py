"""Builds the emulated CUDA backend (tests/emulation) and puts it in place of leaf_cuda's CPU kernels."""

import contextlib
import fcntl
from pathlib import Path

import torch
from torch.utils import cpp_extension

from leaf_cuda import _ops  # first, so that the operators are leaf_cuda's own, and not the emulation's copy

ROOT = Path(__file__).parent.parent
SOURCES = [line.split()[1] for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if line.startswith("core")]

ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}


def _load() -> None:
    build = ROOT / "build" / f"emulation-torch-{torch.__version__}"
    build.mkdir(parents=True, exist_ok=True)
    emulation = ROOT / "tests/emulation"
    with (build / "one-at-a-time").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the process ends; torch's own lock, a file, may outlive it
        (build / "lock").unlink(missing_ok=True)
        cpp_extension.load(
            "leaf_cuda_emulated",
            [str(emulation / "emulated_backend.cpp"), str(emulation / "cuda_emulation.cpp")]
            + [str(ROOT / "csrc" / path) for path in SOURCES if not path.startswith("cpu/")],
            extra_include_paths=[str(emulation / "include")],
            extra_cflags=["-O2", "-g0", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-Wno-psabi"],
            build_directory=str(build),
            is_python_module=False,
        )


_load()


def configure(blocks="ascending", threads="ascending", seed=0, multiprocessors=2) -> None:
    """Sets the order in which blocks, and threads between barriers, run from now on, and the number of multiprocessors
    that the planner sees."""
    torch.ops.leaf_cuda_emulated.configure(ORDERS[blocks], ORDERS[threads], seed, multiprocessors)


@contextlib.contextmanager
def installed():
    """Within, torch.ops.leaf_cuda runs the emulated CUDA kernels on CPU tensors."""
    library = torch.library.Library("leaf_cuda", "IMPL")
    for name in (name for name in vars(_ops) if name.startswith("leaf_")):
        emulated = getattr(torch.ops.leaf_cuda_emulated, name).default
        library.impl(name, emulated, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
        configure()
