"""Compiles what is in tests/emulation, once for each torch."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
EMULATION = ROOT / "tests/emulation"
BUILD = ROOT / "build" / f"emulation-torch-{torch.__version__}"


@contextlib.contextmanager
def folder(name: str) -> Iterator[Path]:
    """The folder to build ``name`` in, for one process at a time."""
    path = BUILD / name
    path.mkdir(parents=True, exist_ok=True)
    with (path / "one-at-a-time").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the process ends; torch's own lock, a file, may outlive it
        yield path


def load(name: str, sources: list[Path], cflags: tuple[str, ...] = (), ldflags: tuple[str, ...] = ()) -> None:
    """Compiles the sources, with the emulation, to a library of operators, unless that is up to date, and loads it."""
    with folder(name) as build:
        (build / "lock").unlink(missing_ok=True)
        cpp_extension.load(
            name,
            [str(path) for path in (*sources, EMULATION / "cuda_emulation.cpp")],
            extra_include_paths=[str(EMULATION / "include")],
            extra_cflags=["-std=c++20", "-O2", "-g0", "-Wno-unknown-pragmas", "-Wno-psabi", *cflags],
            extra_ldflags=list(ldflags),
            build_directory=str(build),
            is_python_module=False,
        )
