"""Forward is one kernel, backward at most two, and there is nothing else: parameters are read, and their gradients
written, where they lie."""

import pytest
import torch
from cases import GRANULARITIES, LAYOUTS, draw, gpu_is_emulated
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

#: Operations that move no element.
ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::expand", "aten::as_strided"}


def launches_of(request, run):
    """The number of kernels that run() launches (None on the CPU), and the PyTorch operations in it."""
    param = request.node.callspec.params["device"]
    counted = param == "emulated" or (param == "cuda" and gpu_is_emulated())
    profiled = param == "cuda" and not counted
    emulation = torch.ops.leaf_cuda_emulated if param == "emulated" else torch.ops.emulated_gpu
    before = emulation.launches() if counted else 0
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * profiled) as recorded:
        run()
        if profiled:
            torch.cuda.synchronize()
    operations = {e.name for e in recorded.events() if e.name.startswith("aten::")}
    if counted:
        return emulation.launches() - before, operations
    if profiled:
        return sum(e.device_type == DeviceType.CUDA for e in recorded.events()), operations
    return None, operations


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rotated", "unaligned"])
@pytest.mark.parametrize("granularity", ["layer", "channel", "element", "features", "no_p2", "ahaf"])
@pytest.mark.parametrize("size", [(3, 5, 4, 7), (40, 64, 8, 8)], ids=str)
def test_nothing_but_the_kernels(request, device, size, granularity, layout):
    u, parameters, g = draw(*GRANULARITIES[granularity](*size), dtype=torch.bfloat16, device=device)
    u, g = (LAYOUTS[layout](t) if t.dim() == 4 else t for t in (u, g))
    parameters = [p if p is None else p.float() for p in parameters]
    wanted = [True] + [p is not None for p in parameters]
    ops = torch.ops.leaf_cuda
    for most, run in (
        (1, lambda: ops.leaf_forward(u, *parameters)),
        (2, lambda: ops.leaf_backward(g, u, *parameters, wanted)),
    ):
        launches, operations = launches_of(request, run)
        assert operations <= ALLOCATIONS
        assert launches is None or 1 <= launches <= most
