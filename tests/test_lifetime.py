"""Threads, processes, memory over time, interpreter exit, and what else happens to a module in its life."""

import copy
import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import leaf_cuda


def train(module, x):
    """y, du, and the parameters' gradients, without accumulating them in the module."""
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def test_python_threads(device):
    """Forward and backward of one module in several threads at once."""
    module = leaf_cuda.LEAF.per_channel(3, init_as="SiLU").to(device)
    inputs = [torch.randn(4, 3, 20, 20, device=device) for _ in range(8)]
    expected = [train(module, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: [train(module, x) for x in inputs], range(8)):
            for a, b in zip(results, expected):
                assert all(torch.equal(x, y) for x, y in zip(a, b))


def run_python(code):
    # Not in the source folder, which has no build if the package is installed.
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent
    )


def test_import_is_light():
    """It imports nothing that takes as long as torch, and that torch does not import itself."""
    result = run_python(
        "import sys, torch; before = set(sys.modules)\n"
        "import leaf_cuda\n"
        "print(*sorted(m for m in set(sys.modules) - before if m.split('.')[0] != 'leaf_cuda'))\n"
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) < 20, result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_import():
    """As DataLoader's workers do. With one thread, since PyTorch's own thread pool does not survive a fork."""
    result = run_python(
        "import os, torch, leaf_cuda\n"
        "torch.set_num_threads(1)\n"
        "u, p = torch.randn(1000, 64, requires_grad=True), torch.ones(64)\n"
        "y = leaf_cuda.leaf(u.detach(), p, p, p, p)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    same = torch.equal(leaf_cuda.leaf(u.detach(), p, p, p, p), y)\n"
        "    os._exit(0 if same else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert result.stdout.strip() == "0", result.stderr


def test_end_of_the_interpreter():
    """Python exits silently while an autograd graph is alive, also in threads."""
    result = run_python(
        "import threading, torch, leaf_cuda\n"
        "net = leaf_cuda.LEAF(size=(4,))\n"
        "y = net(torch.randn(3, 4))\n"
        "y.sum().backward(retain_graph=True)\n"
        "t = threading.Thread(target=lambda: net(torch.randn(3, 4)).sum().backward()); t.start(); t.join()\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_memory_stays_flat():
    """Runs in a process of its own, since what is read is the peak of its whole life."""
    pytest.importorskip("resource")
    result = run_python(
        "import resource, torch, leaf_cuda\n"
        "u, p = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(3, 1, 1, requires_grad=True)\n"
        "def peak_after(times):\n"
        "    for _ in range(times):\n"
        "        torch.autograd.grad(leaf_cuda.leaf(u, p, p, p, p).sum(), (u, p))\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak_after(2_000)\n"
        "print(peak_after(10_000) - before)\n"
    )
    # 10,000 tensors of u's 480 bytes would be 5 MB, graphs far more. ru_maxrss counts KiB on Linux.
    assert int(result.stdout) < 2_000, result.stderr


def test_no_reference_is_kept(device):
    """Once the caller drops u, y, the gradient, the parameters and the module, they are freed."""
    module = leaf_cuda.LEAF(size=(4,)).to(device)
    u = torch.randn(3, 4, device=device, requires_grad=True)
    y = module(u)
    y.sum().backward()
    dead = [weakref.ref(t) for t in (u, y, u.grad, module, *module.parameters())]
    del u, y, module
    gc.collect()
    assert [r() for r in dead] == [None] * len(dead)


# ---- a module among PyTorch's tools ----------------------------------------------------------------------------------


def network(activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), activation, nn.Linear(4, 4), activation)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(device, reentrant):
    module = network(leaf_cuda.LEAF(size=(4,), init_as="SiLU")).to(device)
    x = torch.randn(5, 6, device=device, requires_grad=True)
    expected = torch.autograd.grad(module(x).sin().sum(), [x, *module.parameters()])
    checkpoint(module, x, use_reentrant=reentrant).sin().sum().backward()
    assert all(torch.equal(t.grad, e) for t, e in zip([x, *module.parameters()], expected))


def test_one_module_in_two_places(device):
    """Its gradients are the sums over both places."""
    shared = network(leaf_cuda.AHAF(size=(4,), init_as="SiLU")).to(device, torch.float64)
    apart = copy.deepcopy(shared)
    apart[3] = copy.deepcopy(apart[1])
    x = torch.randn(5, 6, dtype=torch.float64, device=device)
    for module in (shared, apart):
        module(x).sin().sum().backward()
    assert len(list(shared.parameters())) == 6
    for name in ("gamma", "beta"):
        total = getattr(apart[1], name).grad + getattr(apart[3], name).grad
        torch.testing.assert_close(getattr(shared[1], name).grad, total)


def test_backward_hooks(device):
    module, seen = leaf_cuda.LEAF(init_as="SiLU").to(device), []
    module.register_full_backward_hook(lambda _, grads_in, grads_out: seen.append((grads_in[0], grads_out[0])))
    x, g = torch.randn(3, device=device, requires_grad=True), torch.randn(3, device=device)
    module(x).backward(g)
    assert torch.equal(seen[0][0], x.grad) and torch.equal(seen[0][1], g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parametrization(dtype):
    class Positive(nn.Module):
        def forward(self, p):
            return p.abs()

    module = leaf_cuda.LEAF(size=(4,), init_as=(1, 0, -2, 0))
    nn.utils.parametrize.register_parametrization(module, "p3", Positive())
    module.to(dtype)
    u = torch.randn(3, 4, dtype=dtype)
    y = module(u)
    assert y.dtype == dtype and module.p3.dtype == torch.float32
    assert torch.equal(y, leaf_cuda.leaf(u, 1, 0, 2, 0))
    y.sum().backward()
    assert module.parametrizations.p3.original.grad is not None


def test_what_stands_for_a_parameter_comes_first():
    """Pruned parameters and those of DataParallel's replicas are attributes of the instance."""
    u, p2 = torch.randn(3, 4), torch.tensor([2.0, 0, 0, 2])
    pruned, module = (leaf_cuda.LEAF(size=(4,), init_as=(1, 2, 3, 4)) for _ in range(2))
    prune.custom_from_mask(pruned, "p2", p2 != 0)
    assert torch.equal(pruned(u), leaf_cuda.leaf(u, 1, p2, 3, 4))
    replica = module._replicate_for_data_parallel()
    for name, value in zip(("p1", "p2", "p3", "p4"), (5.0, 6.0, 7.0, 8.0)):
        setattr(replica, name, torch.tensor(value))
    assert torch.equal(replica(u), leaf_cuda.leaf(u, 5, 6, 7, 8))


@pytest.mark.parametrize("kind, name", [(leaf_cuda.LEAF, "p3"), (leaf_cuda.AHAF, "gamma")])
def test_a_deleted_parameter(kind, name):
    module = kind()
    delattr(module, name)
    assert not hasattr(module, name)
    with pytest.raises(AttributeError, match=f"'{kind.__name__}' object has no attribute '{name}'"):
        module(torch.ones(3))
    setattr(module, name, nn.Parameter(torch.ones(1)))
    assert [n for n, _ in module.named_parameters()][-1] == name


@pytest.mark.parametrize("compiled", [False, True])
def test_a_parameter_turned_buffer(compiled):
    module = leaf_cuda.LEAF(init_as=(1, 2, 3, 4))
    del module.p2
    module.register_buffer("p2", torch.tensor([5.0]))
    run = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    u = torch.randn(3, 4)
    assert torch.equal(run(u), leaf_cuda.leaf(u, 1, 5, 3, 4))


def test_skip_init():
    assert nn.utils.skip_init(leaf_cuda.LEAF, size=(4,)).p1.shape == (4,)


def test_averaged_model():
    module = network(leaf_cuda.LEAF(size=(4,)))
    averaged = torch.optim.swa_utils.AveragedModel(module)
    averaged.update_parameters(module)
    x = torch.randn(2, 6)
    assert torch.equal(averaged(x), module(x))


def test_compiled_autograd():
    module = network(leaf_cuda.LEAF(size=(4,), init_as="SiLU"))
    x = torch.randn(5, 6)
    expected = torch.autograd.grad(module(x).sin().sum(), list(module.parameters()))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        module(x).sin().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(module.parameters(), expected))
