"""Types of arguments that several functions take."""

from collections.abc import Iterable

import torch

#: An initial form: a name, ("Swish", β), or (p1, p2, p3, p4).
Form = str | tuple[str, float] | tuple[float, float, float, float]
Size = int | Iterable[int]
Device = torch.device | str | int | None
