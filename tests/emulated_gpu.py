"""Runs the tests that need a GPU without one: the CUDA builds of torch and of this package, as they are, on an emulated
CUDA runtime (tests/emulation/emulated_runtime.cpp, emulated_gpu.cpp).

    python tests/emulated_gpu.py [pytest's arguments]

This file is also the plugin that the tests are run with.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import gpu_is_emulated
from emulation_build import EMULATION, folder, load

import leaf_cuda

_NO_CELLS = "PyTorch has no CPU kernel for its recurrent layers' CUDA operators"
#: Tests that this does not emulate enough for, by the beginning of their names.
NEEDS_A_GPU = {
    "test_compile_with_reduced_overhead": "Triton calls the driver",
    "test_few_rows_of_many_columns[cuda": "takes more than the emulated GPU's memory",
    "test_begins_as_torchs[cuda": _NO_CELLS,
    "test_cells_begin_as_torchs[cuda": _NO_CELLS,
    "test_dropout[cuda": _NO_CELLS,
}


def build_runtime() -> Path:
    """Compiles the runtime. Returns its file, beside which libcuda.so.1 lies."""
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc")  # for its headers: this is no CUDA code
    if nvcc is None:
        sys.exit("emulated_gpu.py: there is no nvcc on PATH, and CUDA_HOME is not set")
    with folder("emulated_runtime") as build:
        library, driver = build / "libemulated_runtime.so", build / "libcuda.so.1"
        command = [nvcc, "-std=c++20", "-O1", "-shared", "-Xcompiler=-fPIC,-Wall", "--cudart=none", "-ldl"]
        subprocess.run([*command, "-o", library, EMULATION / "emulated_runtime.cpp"], check=True)
        driver.unlink(missing_ok=True)
        driver.symlink_to(library.name)
    return library


def pytest_configure() -> None:
    if not gpu_is_emulated():
        pytest.exit("start the tests by `python tests/emulated_gpu.py`", returncode=1)
    runtime = Path(os.environ["LD_PRELOAD"].split(os.pathsep)[0]).parent
    load("emulated_gpu", [EMULATION / "emulated_gpu.cpp"], ldflags=(f"-L{runtime}", "-lemulated_runtime"))
    # Else tests would be skipped.
    if torch.cuda.device_count() != 2 or leaf_cuda.backend_for(torch.empty(0, device="cuda")) != "cuda":
        pytest.exit("there are no two emulated GPUs, or leaf_cuda has no CUDA backend", returncode=1)
    # PyTorch's choice among CUDA's libraries, none of which runs here.
    torch.backends.cudnn.enabled = False
    for use in (
        torch.backends.cuda.enable_flash_sdp,
        torch.backends.cuda.enable_mem_efficient_sdp,
        torch.backends.cuda.enable_cudnn_sdp,
    ):
        use(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in NEEDS_A_GPU.items():
            if item.name.startswith(name):
                item.add_marker(pytest.mark.skip(reason=f"not on an emulated GPU: {reason}"))


if __name__ == "__main__":
    runtime = build_runtime()
    paths = {
        "LD_PRELOAD": runtime,
        "LD_LIBRARY_PATH": runtime.parent,
        "PYTHONPATH": Path(__file__).parent,
    }
    environment = os.environ | {
        name: os.pathsep.join(filter(None, (str(path), os.environ.get(name)))) for name, path in paths.items()
    }
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-P", "-m", "pytest", "-p", "emulated_gpu", "-m", "cuda and not slow", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)
