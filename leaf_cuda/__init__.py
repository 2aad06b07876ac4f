"""LEAF, the Learnable Extended Activation Function, as fused CPU and CUDA kernels for PyTorch."""

from . import convert, models, nn, optim, plot
from ._version import __version__
from .function import LeafFunction
from .functional import FallbackWarning, ahaf, leaf, leaf_glu
from .info import backend_for, build_info
from .modules import AHAF, LEAF

__all__ = [
    "AHAF",
    "FallbackWarning",
    "LEAF",
    "LeafFunction",
    "__version__",
    "ahaf",
    "backend_for",
    "build_info",
    "convert",
    "leaf",
    "leaf_glu",
    "models",
    "nn",
    "optim",
    "plot",
]
