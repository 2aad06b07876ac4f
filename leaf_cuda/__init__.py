"""LEAF, the Learnable Extended Activation Function, as fused CPU and CUDA kernels for PyTorch."""

from . import convert as convert
from . import models as models
from . import nn as nn
from . import optim as optim
from . import plot as plot
from ._version import __version__
from .function import LeafFunction
from .functional import FallbackWarning, ahaf, leaf, leaf_glu
from .info import backend_for, build_info
from .modules import AHAF, LEAF

# Without the modules: `from leaf_cuda import *` would replace torch's nn.
__all__ = [
    "AHAF",
    "FallbackWarning",
    "LEAF",
    "LeafFunction",
    "__version__",
    "ahaf",
    "backend_for",
    "build_info",
    "leaf",
    "leaf_glu",
]
