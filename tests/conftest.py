"""The devices that the numerical tests run on."""

import json
import re
from pathlib import Path

import pytest
import torch

import leaf_cuda
from leaf_cuda import _ops, functional

#: The table in docs/compatibility.md: a feature → its tests, as a regular expression.
FEATURES = {
    "`torch.autograd`: gradients, of any subset": r"test_gradcheck.*(granularities|forms)|subsets_that_require",
    "double backward (second-order gradients)": r"test_gradcheck.*(second|third)_order|test_double_backward|gradient_penalty",
    "forward mode: `forward_ad`, `jvp`, `jacfwd`, nested": r"test_forward_mode|test_forward_transforms",
    "`torch.func`: `grad`, `vjp`, `jacrev`, `functional_call`": r"test_func.*(test_transforms|test_ensemble)",
    "`vmap` over u and parameters, with `grad` inside and outside": r"test_func.*vmap",
    "`torch.compile(fullgraph=True)`": r"test_operators.*test_compile|test_func.*test_compiled|test_compiled_autograd",
    "`torch.library.opcheck`": r"test_opcheck",
    "`torch.export`, strict and not": r"test_export.*test_export",
    "AOTInductor": r"test_aot_inductor",
    "ONNX": r"test_onnx",
    "`torch.fx`, `torch.jit.trace`": r"test_export.*test_(fx|jit)",
    "autocast; parameters in float32 under `.half()`": r"test_modules.*(autocast|stay_in_float32|opt_out|checkpoints)",
    "`state_dict`, `deepcopy`, `pickle`, meta device": r"test_modules.*(state_dict|copies|meta_device)",
    "checkpointing, hooks, parametrizations, sharing": r"test_lifetime.*(checkpointing|hooks|parametriz|two_places|skip_init)",
    "double-stage training: the authors' runs, autocast, `GradScaler`": r"test_optim|test_golden.*test_training",
    "LEAF in the place of a model's activations": r"test_convert",
    "the experiments: interrupted and resumed, bit for bit": r"test_paper_experiments.*(resume|more_epochs)",
    "Python threads, `fork`": r"test_lifetime.*(threads|fork)",
    "DistributedDataParallel": r"test_two_processes.*ddp",
    "FSDP2": r"test_two_processes.*fsdp",
    "DTensor": r"test_two_processes.*dtensor",
    "gated units: `leaf_glu`, `LeafGLU`, `LeafMLP`": r"test_glu",
    "recurrent layers: `LeafLSTM`, `LeafGRU`, their cells": r"test_recurrent",
}


def pytest_addoption(parser):
    parser.addoption(
        "--features", metavar="FOLDER", help="write what of FEATURES passed, for the table of docs/compatibility.md"
    )


def pytest_terminal_summary(terminalreporter, config):
    folder = config.getoption("--features")
    if not folder:
        return
    counts = {
        feature: {
            outcome: sum(bool(re.search(pattern, r.nodeid)) for r in terminalreporter.stats.get(outcome, []))
            for outcome in ("passed", "failed", "error", "xfailed")
        }
        for feature, pattern in FEATURES.items()
    }
    where = {"torch": torch.__version__, "cuda_build": bool(leaf_cuda.build_info()["cuda"])}
    where["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f"torch-{torch.__version__}.json"
    path.write_text(json.dumps({**where, "features": counts}, indent=1) + "\n")


def pytest_configure(config):
    config.addinivalue_line("markers", "emulated: runs the CUDA kernels' source, compiled for the host")
    config.addinivalue_line("markers", "cuda: needs a GPU and a build with CUDA")
    config.addinivalue_line("markers", "slow: takes more than ten seconds")


def pytest_collectstart(collector):
    torch.manual_seed(0)  # for the weights of models that a test file makes when it is imported, as parameters of tests


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("emulated", marks=pytest.mark.emulated),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]
)
def device(request):
    """A device string. On "emulated" it is "cpu", and leaf_cuda's CPU kernels are the emulated CUDA kernels."""
    if request.param == "emulated":
        emulated_backend = pytest.importorskip("emulated_backend", reason="the CUDA kernels are not emulated here")
        with emulated_backend.installed():
            yield "cpu"
        return
    if request.param == "cuda":
        request.getfixturevalue("needs_cuda")
    yield request.param


@pytest.fixture
def needs_cuda():
    """Skips the test where there is no GPU, or no CUDA backend."""
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    if leaf_cuda.backend_for(torch.empty(0, device="cuda")) != "cuda":
        pytest.skip("this build of leaf_cuda is without CUDA")


@pytest.fixture
def remove_kernels(monkeypatch):
    """A function that leaves leaf_cuda without kernels for any device."""

    def remove():
        monkeypatch.setattr(_ops, "has_kernel", lambda device_type: False)
        for name in ("plain_leaf_forward", "plain_leaf_glu_forward"):
            monkeypatch.setattr(_ops, name, lambda *arguments: NotImplemented)
        monkeypatch.setattr(functional, "_warned", set())

    return remove


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def set_threads():
    """Tests run on one thread unless they call this: on a shared machine it takes longer to hand most of these small
    operations to threads than to compute them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["leaf", "LeafFunction", "operator"])
def route(request):
    """The ways to call the same function, (u, p1, p2, p3, p4) → y."""
    return {
        "leaf": leaf_cuda.leaf,
        "LeafFunction": leaf_cuda.LeafFunction.apply,
        "operator": torch.ops.leaf_cuda.leaf_forward,
    }[request.param]
