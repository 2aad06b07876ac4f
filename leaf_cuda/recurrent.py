"""LSTM and GRU with LEAF in place of their sigmoids and tanhs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from . import _ops, reference
from ._types import Device
from .functional import arithmetic_dtype, needs_reference, run_reference
from .modules import FORMS, LearnableActivation, graph_call, has_all_but_leaf_parameters

#: (h, c) of an LSTM, h of a GRU.
State = Tensor | tuple[Tensor, Tensor]


class CellLEAF(LearnableActivation):
    """The LEAFs of a recurrent cell. Row k of p1, p2, p3 and p4 belongs to the k-th LEAF; each parameter has shape
    (number of LEAFs, 1) or, with ``per_unit``, (number of LEAFs, hidden_size).

    ``forms`` maps their names to their initial forms, in the order of the rows: "input_gate", "forget_gate",
    "candidate", "output_gate" and "cell_output" of an LSTM; "reset_gate", "update_gate" and "candidate" of a GRU. The
    recurrent layers compute with the parameters; the module itself is not called.
    """

    def __init__(self, forms: dict[str, str], hidden_size: int, per_unit: bool, **kwargs: Any):
        self.forms = forms
        super().__init__(size=(len(forms), hidden_size if per_unit else 1), init_as=tuple(forms.values()), **kwargs)

    def _initial_values(self) -> dict[str, tuple[float, ...]]:
        return dict(zip(_ops.PARAMETERS, zip(*(FORMS[form] for form in self.forms.values()))))

    def parts(self) -> dict[str, tuple]:
        return {
            f".{name}": (form, self.p1[row], self.p2[row], self.p3[row], self.p4[row])
            for row, (name, form) in enumerate(self.forms.items())
        }

    def extra_repr(self) -> str:
        return f"size={self.size}, " + ", ".join(f"{name}={form}" for name, form in self.forms.items())


LSTM_FORMS = {
    "input_gate": "Sigmoid",
    "forget_gate": "Sigmoid",
    "candidate": "Tanh",
    "output_gate": "Sigmoid",
    "cell_output": "Tanh",
}
GRU_FORMS = {"reset_gate": "Sigmoid", "update_gate": "Sigmoid", "candidate": "Tanh"}


@_ops.constant_to_dynamo  # Dynamo of torch 2.11 cannot trace this query
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _autocasts(device_type: str) -> bool:
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


class Recurrent(nn.Module):
    """Base class of the cells and the layers; it precedes torch's own class in the order of bases."""

    _forms: dict[str, str]
    _state_names: tuple[str, ...]

    def _add_leaf(self, name: str, weight: Tensor, per_unit: bool) -> None:
        leaf = CellLEAF(
            self._forms, self.hidden_size, per_unit, device=weight.device, dtype=arithmetic_dtype(weight.dtype)
        )
        self.add_module(name, leaf)

    def _leaves(self):
        return [(name, child) for name, child in self.named_children() if isinstance(child, CellLEAF)]

    def reset_parameters(self) -> None:
        """Initialises the weights anew, and resets LEAF's parameters to their initial form."""
        super().reset_parameters()
        for _, leaf in self._leaves():
            leaf.reset_parameters()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, leaf in self._leaves() if has_all_but_leaf_parameters(self, state_dict, prefix) else ():
            # The weight, or what stands for it: pruning and parametrizations give it other names.
            of_weight = f"weight_hh{name.removeprefix('leaf')}"
            weights = (t for key, t in state_dict.items() if key.startswith(prefix) and of_weight in key)
            leaf.add_initial_values(state_dict, f"{prefix}{name}.", next(weights, None))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _run(self, suffix: str, x: Tensor, states: list[Tensor], batch_sizes: Tensor | None, reverse: bool):
        """Runs one layer in one direction: x, (steps, batch, features) or, with batch_sizes, (rows, features) → output
        and the states after the last step."""
        weights = [name + suffix for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        tensors = dict(zip(("input", "h", "c"), (x, *states, None)))
        tensors |= {name: getattr(self, name, None) for name in weights}
        if _autocasts(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = {k: t if t is None or t.dtype == torch.float64 else t.to(dtype) for k, t in tensors.items()}
        leaf = getattr(self, "leaf" + suffix)
        tensors |= {f"leaf{suffix}.{p}": getattr(leaf, p) for p in _ops.PARAMETERS}
        return self._compute(tensors, batch_sizes, reverse)

    def _compute(self, tensors: dict[str, Tensor | None], batch_sizes: Tensor | None, reverse: bool):
        """The operator's results. ``tensors`` are its arguments, by the names that errors give them."""
        operator = _ops.leaf_recurrent_forward
        if needs_reference(tensors["input"]):
            return run_reference(type(self).__name__, operator, reference.recurrent, tensors, batch_sizes, reverse)
        return operator(*tensors.values(), batch_sizes, reverse)[: 1 + len(self._state_names)]

    def _fail(self, error: type[Exception], message: str):
        raise error(f"{type(self).__name__}: {message}")

    def _check_input(self, x: Tensor, weight: Tensor) -> None:
        if x.size(-1) != self.input_size:
            self._fail(
                ValueError, f"input has shape {tuple(x.shape)}; its last dimension takes input_size, {self.input_size}"
            )
        self._check_like("input", x, weight)

    def _check_like(self, name: str, t: Tensor, weight: Tensor) -> None:
        if t.dtype != weight.dtype and not (_autocasts(t.device.type) and t.is_floating_point()):
            self._fail(TypeError, f"{name} has dtype {t.dtype}; it takes the weights' {weight.dtype}")
        if t.device != weight.device:
            self._fail(ValueError, f"{name} is on {t.device}; it takes the weights' {weight.device}")

    def _check_states(self, hx, shape: tuple, weight: Tensor) -> list[Tensor]:
        """hx as a list: (h, c) of an LSTM, h of a GRU; zeros for None."""
        if hx is None:
            return [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in self._state_names]
        names = self._state_names
        states = [hx] if len(names) == 1 else hx
        if len(names) == 2 and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            self._fail(TypeError, f"hx is of type {type(hx).__name__}; it takes a pair of tensors, (h, c)")
        for name, state in zip(names, states):
            if not isinstance(state, Tensor):
                self._fail(TypeError, f"{name} is of type {type(state).__name__}; it takes a tensor")
            if tuple(state.shape) != tuple(shape):
                self._fail(ValueError, f"{name} has shape {tuple(state.shape)}; it takes {tuple(shape)}")
            self._check_like(name, state, weight)
        return list(states)

    def _as_hx(self, states: list[Tensor]):
        return tuple(states) if len(states) == 2 else states[0]


class _Cell(Recurrent):
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        per_unit: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(input_size, hidden_size, bias, device=device, dtype=dtype)
        self._add_leaf("leaf", self.weight_hh, per_unit)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        if isinstance(input, Proxy) and (call := graph_call(self, _Cell, input, hx)) is not None:
            return call
        if not isinstance(input, Tensor):
            self._fail(TypeError, f"input is of type {type(input).__name__}; it takes a tensor")
        if input.dim() not in (1, 2):
            self._fail(ValueError, f"input has shape {tuple(input.shape)}; it takes (batch, features) or (features)")
        self._check_input(input, self.weight_ih)
        states = self._check_states(hx, (*input.shape[:-1], self.hidden_size), self.weight_ih)
        batched = input.dim() == 2
        if not batched:
            input, states = input[None], [s[None] for s in states]
        _, *states = self._run("", input[None], states, None, False)
        return self._as_hx(states if batched else [s[0] for s in states])


# Not derived from torch's LSTM and GRU, which torch.compile refuses by their type.
class _Layers(Recurrent, nn.RNNBase):
    mode: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        per_unit: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        like = {"device": device, "dtype": dtype}
        super().__init__(
            self.mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, **like
        )
        for layer in range(num_layers):
            for direction in range(self._directions):
                suffix = self._suffix(layer, direction)
                self._add_leaf(f"leaf{suffix}", getattr(self, f"weight_hh{suffix}"), per_unit)

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @staticmethod
    def _suffix(layer: int, direction: int) -> str:
        return f"_l{layer}" + "_reverse" * direction

    def flatten_parameters(self) -> None:
        """Does nothing: torch's layers lay the weights out for cuDNN, which is not used here."""

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor | PackedSequence, State]:
        if isinstance(input, Proxy) and (call := graph_call(self, _Layers, input, hx)) is not None:
            return call
        packed = isinstance(input, PackedSequence)
        x, batch_sizes, sorted_indices, unsorted_indices = input if packed else (input, None, None, None)
        if not isinstance(x, Tensor):
            self._fail(TypeError, f"input is of type {type(x).__name__}; it takes a tensor or a PackedSequence")
        if x.dim() not in ((2,) if packed else (2, 3)):
            shapes = "(batch, steps, features)" if self.batch_first else "(steps, batch, features)"
            self._fail(ValueError, f"input has shape {tuple(x.shape)}; it takes {shapes} or (steps, features)")
        self._check_input(x, self.weight_ih_l0)
        if not packed and x.size(1 if x.dim() == 3 and self.batch_first else 0) == 0:
            self._fail(ValueError, f"input has shape {tuple(x.shape)}; it takes one step or more")
        batched, transposed = packed or x.dim() == 3, not packed and x.dim() == 3 and self.batch_first
        if not batched:
            x = x[:, None]
        elif transposed:
            x = x.transpose(0, 1)
        batch = (int(batch_sizes[0]) if packed else x.size(1),) if batched else ()
        shape = (self.num_layers * self._directions, *batch, self.hidden_size)
        states = self._check_states(hx, shape, self.weight_ih_l0)
        if not batched:
            states = [s[:, None] for s in states]
        if sorted_indices is not None:
            states = [s.index_select(1, sorted_indices) for s in states]

        last = [[] for _ in states]
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(self._directions):
                initial = [s[layer * self._directions + direction] for s in states]
                output, *after = self._run(self._suffix(layer, direction), x, initial, batch_sizes, direction == 1)
                outputs.append(output)
                for of_layers, state in zip(last, after):
                    of_layers.append(state)
            x = torch.cat(outputs, -1) if self.bidirectional else output
            if layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        states = [torch.stack(s) for s in last]
        if unsorted_indices is not None:
            states = [s.index_select(1, unsorted_indices) for s in states]
        if not batched:
            x, states = x[:, 0], [s[:, 0] for s in states]
        elif transposed:
            x = x.transpose(0, 1)
        output = PackedSequence(x, batch_sizes, sorted_indices, unsorted_indices) if packed else x
        return output, self._as_hx(states)


class LeafLSTMCell(_Cell, nn.LSTMCell):
    """``torch.nn.LSTMCell`` with LEAF in place of its sigmoids and tanhs, whose values LEAF has at the start.

    With the pre-activations i, f, g, o = W_ih x + b_ih + W_hh h + b_hh, c' = leaf(f)·c + leaf(i)·leaf(g) and
    h' = leaf(o)·leaf(c'), each LEAF with parameters of its own. (Bodyanskiy & Kostiuk 2023, doi 10.47839/ijc.22.3.3225,
    name LEAF as a replacement for sigmoid and tanh in recurrent networks.) All pointwise operations together are one
    fused pass in forward and one in backward.

    Inputs, outputs and weights are torch's: input (batch, input_size) or (input_size), hx None or (h, c) of
    (batch, hidden_size) or (hidden_size), → (h', c'). float64, float32, bfloat16 or float16. A state dict of
    ``nn.LSTMCell`` loads with strict=True; the parameters of LEAF (``leaf``: :class:`CellLEAF`) then have their initial
    form.

    If p1 is trained, a gate has no bounds: over many steps the state may overflow. With p1 fixed at its initial 0
    (``cell.leaf.p1.requires_grad_(False)``) a gate stays between p4 and p2 + p4.

    Args:
        input_size, hidden_size, bias, device, dtype: as in torch. LEAF's parameters are in float32, or float64 if the
            weights are.
        per_unit: whether each hidden unit has LEAF parameters of its own, instead of one set for all units of a gate.

    Raises (on a call):
        TypeError: an argument is of another type, or its dtype is not the weights' (outside of autocast).
        ValueError: an argument is of another shape, or on another device.
    """

    _forms, _state_names = LSTM_FORMS, ("hx[0]", "hx[1]")


class LeafGRUCell(_Cell, nn.GRUCell):
    """``torch.nn.GRUCell`` with LEAF in place of its sigmoids and tanh, whose values LEAF has at the start.

    With r, z, n = W_ih x + b_ih and r', z', n' = W_hh h + b_hh, the candidate is q = leaf(n + leaf(r + r')·n') and
    h' = q + leaf(z + z')·(h − q). All else is as in :class:`LeafLSTMCell`; hx and the result are h alone.
    """

    _forms, _state_names = GRU_FORMS, ("hx",)


class LeafLSTM(_Layers):
    """``torch.nn.LSTM`` with LEAF in place of its sigmoids and tanhs, whose values LEAF has at the start. See
    :class:`LeafLSTMCell` for the formula, and for what a trained p1 does.

    Inputs, outputs and weights are torch's: input (steps, batch, input_size), with ``batch_first`` (batch, steps,
    input_size), unbatched (steps, input_size), or a ``PackedSequence``; hx None or (h, c) of (num_layers·directions,
    batch, hidden_size); → output, (h_n, c_n). A state dict of ``nn.LSTM`` loads with strict=True. LEAF's parameters are
    those of ``leaf_l0``, ``leaf_l0_reverse``, ... (:class:`CellLEAF`). There is no ``proj_size``.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in torch.
            LEAF's parameters are in float32, or float64 if the weights are.
        per_unit: whether each hidden unit has LEAF parameters of its own, instead of one set for all units of a gate.

    Raises (on a call):
        TypeError: an argument is of another type, or its dtype is not the weights' (outside of autocast).
        ValueError: an argument is of another shape, or on another device.
    """

    mode, _forms, _state_names = "LSTM", LSTM_FORMS, ("hx[0]", "hx[1]")


class LeafGRU(_Layers):
    """``torch.nn.GRU`` with LEAF in place of its sigmoids and tanhs, whose values LEAF has at the start. See
    :class:`LeafGRUCell` for the formula, and :class:`LeafLSTMCell` for what a trained p1 does.

    Inputs, outputs and weights are torch's: input (steps, batch, input_size), with ``batch_first`` (batch, steps,
    input_size), unbatched (steps, input_size), or a ``PackedSequence``; hx None or (num_layers·directions, batch,
    hidden_size); → output, h_n. A state dict of ``nn.GRU`` loads with strict=True. LEAF's parameters are those of
    ``leaf_l0``, ``leaf_l0_reverse``, ... (:class:`CellLEAF`).

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in torch.
            LEAF's parameters are in float32, or float64 if the weights are.
        per_unit: whether each hidden unit has LEAF parameters of its own, instead of one set for all units of a gate.

    Raises (on a call):
        TypeError: an argument is of another type, or its dtype is not the weights' (outside of autocast).
        ValueError: an argument is of another shape, or on another device.
    """

    mode, _forms, _state_names = "GRU", GRU_FORMS, ("hx",)
