"""Loads the compiled operators, or says in one sentence why they cannot be loaded."""

import torch

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _load():
    try:
        from . import _build
    except ImportError:
        raise ImportError(
            "leaf_cuda has no compiled operators here: this is a source folder without a build. "
            "Run `pip install --no-build-isolation -e .` in it, or import leaf_cuda from elsewhere."
        ) from None

    def release(version):
        return tuple(version.split("+")[0].split(".")[:2])

    if release(_build.torch) != release(torch.__version__) or (
        _build.cuda and _build.cuda.split(".")[0] != (torch.version.cuda or "none").split(".")[0]
    ):
        raise ImportError(
            f"leaf_cuda was built for torch {_build.torch} (CUDA {_build.cuda or 'none'}), but torch "
            f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}) is running: rebuild with `{_REBUILD}`"
        )
    from . import _C

    return _C


_C = _load()

# A short way to the operators for plain tensors, with no mode, transform or tracer around the call. Otherwise these
# return NotImplemented, and the call must go through torch.ops.
plain_leaf_forward = _C.leaf_forward
plain_leaf_glu_forward = _C.leaf_glu_forward

leaf_forward = torch.ops.leaf_cuda.leaf_forward.default
leaf_backward = torch.ops.leaf_cuda.leaf_backward.default
leaf_double_backward = torch.ops.leaf_cuda.leaf_double_backward.default
leaf_glu_forward = torch.ops.leaf_cuda.leaf_glu_forward.default
leaf_glu_backward = torch.ops.leaf_cuda.leaf_glu_backward.default
leaf_recurrent_forward = torch.ops.leaf_cuda.leaf_recurrent_forward.default
leaf_recurrent_backward = torch.ops.leaf_cuda.leaf_recurrent_backward.default


_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}
_DEVICES = frozenset(
    device
    for device, key in _KEYS.items()
    if torch._C._dispatch_has_kernel_for_dispatch_key("leaf_cuda::leaf_forward", key)
)


#: The names of the four parameters, in the order that is used everywhere.
PARAMETERS = ("p1", "p2", "p3", "p4")


def constant_to_dynamo(function):
    """A decorator: Dynamo calls the function while it traces, and takes the result as a constant. So does
    ``torch.compiler.assume_constant_result``, but it imports all of ``torch._dynamo``, which takes as long as torch."""
    function._dynamo_marked_constant = True
    return function


def has_kernel(device_type: str) -> bool:
    """Whether the operators are registered for a device type ("cpu", "cuda", "meta", ...)."""
    return device_type in _DEVICES
