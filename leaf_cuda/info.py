"""What this build of leaf_cuda is, and what it does for a tensor."""

import torch

from . import _ops
from ._version import __version__


def build_info() -> dict:
    """How the loaded library was built.

    Returns a dict: ``version`` of leaf_cuda, ``torch`` (the version it was built for), ``compiler``, ``openmp`` (if
    False, the CPU kernels run on one thread), ``cuda`` (the toolkit's version) and ``cuda_architectures``, both None in
    a build without CUDA, and ``cpu_instruction_set``, the one in use on this processor: "DEFAULT", "AVX2" or "AVX512".
    """
    return {"version": __version__, **_ops._C.build_info()}


def backend_for(tensor: torch.Tensor) -> str:
    """Which kernels :func:`leaf_cuda.leaf` runs for ``tensor``: ``"cuda"``, ``"cpu"``, or ``"composite"`` (the PyTorch
    formula) where this build has no fused kernel for the tensor's device.

    Raises TypeError if ``tensor`` is no tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor is of type {type(tensor).__name__}; it takes a torch.Tensor")
    device = tensor.device.type
    return device if device in ("cpu", "cuda") and _ops.has_kernel(device) else "composite"
