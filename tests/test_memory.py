"""Promise 1: nothing of u's size beyond y and du; at most one copy of a g of another layout."""

import gc

import pytest
import torch
from cases import LAYOUTS
from torch.profiler import ProfilerActivity, profile

import leaf_cuda


def peak(device, run):
    """The most bytes allocated at once during run(), beyond those allocated before. What run() returns stays alive."""
    gc.collect()  # so that it does not run in between
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated() - before
        del kept
        return most
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    events = [(e.start_ns(), e.nbytes()) for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    del kept
    most = now = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        now += change
        most = max(most, now)
    return most


def size(t):
    return t.numel() * t.element_size()


MIB8 = {torch.float32: 2**21, torch.bfloat16: 2**22}

#: About 8 MiB each: (shape for n elements, shapes of the parameters)
CASES = {
    "layer": lambda n: ((n // 1024, 1024), [(1,)] * 4),
    "channel": lambda n: ((n // 2**16, 64, 32, 32), [(64, 1, 1)] * 4),
    "element": lambda n: ((n // 2**16, 64, 32, 32), [(64, 32, 32)] * 4),
    "features": lambda n: ((n // 512, 512), [(512,)] * 4),
    "odd_features": lambda n: ((n // 509, 509), [(509,)] * 4),
    "no_run": lambda n: ((n // 2**16, 64, 32, 32), [(64, 1, 32)] * 4),
    "long_odd_features": lambda n: ((n // 7_777, 7_777), [(7_777,)] * 4),
    "few_long_rows": lambda n: ((n // 100_003, 100_003), [(100_003,)] * 4),
    "mixed_long": lambda n: ((2, n // 2), [(1,), (1,), (n // 2,), (2, 1)]),
    "full": lambda n: ((n // 1024, 1024), [(n // 1024, 1024)] * 4),
    "ahaf": lambda n: ((n // 512, 512), [(512,), None, (512,), None]),
}


def assert_within(most, u, copies, of_parameters=0):
    """At most `copies` tensors like u, the parameters' gradients, and partial sums in an eighth of u or 1 MiB."""
    bound = copies * size(u) + of_parameters + max(size(u) // 8, 2**20)
    assert most <= bound, f"{most / size(u):.3f} times u, of at most {bound / size(u):.3f}"


def forward_and_backward(u, parameters, g=None):
    y = leaf_cuda.leaf(u, *parameters)
    y.sum().backward() if g is None else y.backward(g)
    return y


def make(device, shape, shapes, dtype=torch.float32, layout="contiguous"):
    u = LAYOUTS[layout](torch.randn(shape, device=device).to(dtype)).requires_grad_()
    parameters = [None if s is None else torch.randn(s, device=device).requires_grad_() for s in shapes]
    return u, parameters, sum(size(p) for p in parameters if p is not None)


@pytest.mark.parametrize("dtype", MIB8, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(device, case, dtype):
    u, parameters, of_parameters = make(device, *CASES[case](MIB8[dtype]), dtype)
    g = torch.randn_like(u)
    most = peak(device, lambda: forward_and_backward(u, parameters, g))
    assert most >= 2 * size(u)  # y and du
    assert_within(most, u, 2, of_parameters)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
@pytest.mark.parametrize("case", ["layer", "channel", "element"])
def test_dense_layouts(device, case, layout):
    shape, shapes = CASES[case](MIB8[torch.float32])
    u, parameters, of_parameters = make(device, (*shape, 1, 1)[:4], shapes, layout=layout)
    g = torch.randn_like(u)
    assert g.stride() == u.stride()
    assert_within(peak(device, lambda: forward_and_backward(u, parameters, g)), u, 2, of_parameters)


def test_forward_alone(device):
    u, parameters, _ = make(device, *CASES["channel"](MIB8[torch.float32]))
    with torch.no_grad():
        assert peak(device, lambda: leaf_cuda.leaf(u, *parameters)) <= size(u) + 4096


@pytest.mark.parametrize("dtype", MIB8, ids=str)
@pytest.mark.parametrize("case", ["no_run", "mixed_long"])
def test_forward_with_copies_of_parameters(device, case, dtype):
    u, parameters, _ = make(device, *CASES[case](MIB8[dtype]), dtype)
    with torch.no_grad():
        assert_within(peak(device, lambda: leaf_cuda.leaf(u, *parameters)), u, 1)


@pytest.mark.parametrize("case", ["layer", "channel", "features"])
def test_gradient_of_a_sum(device, case):
    """An expanded gradient is read as the one element it is."""
    u, parameters, of_parameters = make(device, *CASES[case](MIB8[torch.float32]))
    assert_within(peak(device, lambda: forward_and_backward(u, parameters)), u, 2, of_parameters)


@pytest.mark.parametrize("case", ["layer", "channel", "element"])
def test_gradient_of_another_layout(device, case):
    """g is copied once."""
    shape, shapes = CASES[case](MIB8[torch.float32])
    u, parameters, of_parameters = make(device, shape, shapes)
    g = LAYOUTS["transposed"](torch.randn(shape, device=device))
    assert_within(peak(device, lambda: forward_and_backward(u, parameters, g)), u, 3, of_parameters)


def test_without_parameter_gradients(device):
    u, parameters, _ = make(device, *CASES["features"](MIB8[torch.float32]))
    y = leaf_cuda.leaf(u, *(p.detach() for p in parameters))
    g = torch.randn_like(u)
    assert_within(peak(device, lambda: y.backward(g)), u, 1)


def test_without_du(device):
    u, parameters, of_parameters = make(device, *CASES["features"](MIB8[torch.float32]))
    y = leaf_cuda.leaf(u.detach(), *parameters)
    g = torch.randn_like(u)
    assert_within(peak(device, lambda: y.backward(g)), u, 0, of_parameters)


def test_the_measure_sees_what_it_should(device):
    """Two tensors of u's size and their sum are seen as such."""
    u = torch.randn(2**20, device=device)
    assert 2 * size(u) <= peak(device, lambda: (u + 1) + (u + 2)) <= 3 * size(u)
