"""Builds the emulated CUDA backend (tests/emulation) and puts it in place of leaf_cuda's CPU kernels."""

import contextlib

import torch
from emulation_build import EMULATION, ROOT, load

from leaf_cuda import _ops  # first, so that the operators are leaf_cuda's own, and not the emulation's copy

SOURCES = [line.split()[1] for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if line.startswith("core")]

ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}

load(
    "leaf_cuda_emulated",
    [EMULATION / "emulated_backend.cpp"]
    + [ROOT / "csrc" / path for path in SOURCES if not path.startswith("cpu/leaf_")],
    cflags=("-fvisibility=hidden",),
)


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
