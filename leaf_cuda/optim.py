"""Training of networks with LEAF: parameter groups, and the double-stage parameter tuning procedure."""

from __future__ import annotations

import contextlib
import inspect
import numbers
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .modules import LearnableActivation, check_model


def _activation_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters of every LEAF and AHAF → their names in it: "p2", or "parametrizations.p2.original"."""
    check_model(model)
    names = {}
    for module in model.modules():
        if isinstance(module, LearnableActivation):
            names |= {p: name for name, p in module.named_parameters()}
    return names


def split_activation_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(activation parameters, others): those of every LEAF and AHAF in the model, and all the rest. Each appears once,
    in the model's order, however often it is shared. Either list may be empty.

    Raises TypeError for a model that is no module."""
    activations = _activation_parameters(model)
    return list(activations), [p for p in model.parameters() if p not in activations]


def leaf_param_groups(
    model: nn.Module, lr: float | Tensor, p24_lr: float | Tensor | None = None, weight_decay: float | None = None
) -> list[dict]:
    """Parameter groups, each with its "name", for the optimizers of ``torch.optim`` except LBFGS, which takes one
    group, and Muon, which takes matrices only.

    - "weights": all parameters outside LEAF and AHAF, with ``weight_decay``, or the optimizer's own if that is None. It
      comes first, and may be empty.
    - "activations": those of LEAF and AHAF, without decay; left out if there are none.
    - "p2 and p4": LEAF's p2 and p4, without decay and at ``p24_lr``; if that is None, they are in "activations".

    The authors' p24_lr is lr/1000 for Adam and lr/10 for RMSprop: with ReLU's p3 = 2^16 a small p2 makes a slope near
    p2·p3/4 at u = 0.

    A tensor ``lr`` or ``p24_lr`` is cloned for each group, as schedulers change it in place.

    ``weights, *activations = leaf_param_groups(...)`` splits them for the two optimizers of :class:`DoubleStageTuner`.

    Raises TypeError for a model that is no module.
    """
    names = _activation_parameters(model)
    offsets = {p: None for p, name in names.items() if p24_lr is not None and {"p2", "p4"} & set(name.split("."))}
    groups = []
    for name, parameters, rate, decay in (
        ("weights", split_activation_parameters(model)[1], lr, weight_decay),
        ("activations", [p for p in names if p not in offsets], lr, 0.0),
        ("p2 and p4", list(offsets), p24_lr, 0.0),
    ):
        if parameters or name == "weights":
            rate = rate.clone() if isinstance(rate, Tensor) else rate
            decay = {} if decay is None else {"weight_decay": decay}
            groups.append({"name": name, "params": parameters, "lr": rate, **decay})
    return groups


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for p in _parameters(optimizer))


@contextlib.contextmanager
def _without_gradients(parameters: list[Tensor]) -> Iterator[None]:
    """Within, none of the parameters requires a gradient."""
    frozen = [p for p in parameters if p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(False)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


@contextlib.contextmanager
def _checking_data_parallel(frozen: list[Tensor]) -> Iterator[None]:
    """Within, a DistributedDataParallel that would wait for the gradients of `frozen` raises when called."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    frozen = set(frozen)

    def check(module, inputs):
        if not isinstance(module, DistributedDataParallel):
            return
        if (not module.find_unused_parameters or module.static_graph) and not frozen.isdisjoint(module.parameters()):
            raise ValueError(
                "DoubleStageTuner: DistributedDataParallel was made with "
                f"find_unused_parameters={module.find_unused_parameters}, static_graph={module.static_graph}; each "
                "stage has gradients of some parameters only, so it takes find_unused_parameters=True, "
                "static_graph=False (or single_pass=True here)"
            )

    handle = nn.modules.module.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


class DoubleStageTuner:
    """The double-stage parameter tuning procedure: the activation parameters first, then the weights.

    Bodyanskiy & Kostiuk 2023, doi 10.47839/ijc.22.3.3225. On each batch, the loss is computed and differentiated twice:
    for the activation parameters, which take their step, and then, with the new ones, for the weights::

        weights, *activations = leaf_param_groups(model, lr=1e-3, p24_lr=1e-6)
        tuner = DoubleStageTuner(torch.optim.Adam(activations), torch.optim.Adam([weights]))
        for x, target in batches:
            loss = tuner.step(lambda: criterion(model(x), target))

    The forward runs twice per step: dropout draws, and batch normalisation updates its statistics, in each. With
    ``DistributedDataParallel``, set its ``find_unused_parameters=True``.

    Args:
        activation_optimizer, weight_optimizer: optimizers without a parameter in common, whose own ``step`` needs no
            closure (LBFGS's does). Learning-rate schedulers on them are stepped by the caller.
        scaler: a ``torch.amp.GradScaler``; each stage counts as one iteration, with its own ``update``.
        clip_grad_norm: the maximum 2-norm of the gradients of one optimizer's parameters; larger ones are scaled down.
        single_pass: whether to take both gradients from one forward and one backward instead of two. The weights'
            gradient is then the one before the activation parameters' step.

    Raises:
        TypeError: an optimizer argument is no optimizer, or its ``step`` needs a closure; ``scaler`` is no gradient
            scaler; ``clip_grad_norm`` is no number.
        ValueError: a parameter is in both optimizers, or ``clip_grad_norm`` is not positive.
    """

    def __init__(
        self,
        activation_optimizer: Optimizer,
        weight_optimizer: Optimizer,
        *,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad_norm: float | None = None,
        single_pass: bool = False,
    ):
        for name, optimizer in (("activation_optimizer", activation_optimizer), ("weight_optimizer", weight_optimizer)):
            if not hasattr(optimizer, "param_groups"):
                raise TypeError(f"{name} is of type {type(optimizer).__name__}; it takes a torch.optim.Optimizer")
            closure = inspect.signature(optimizer.step).parameters.get("closure")
            if closure is not None and closure.default is closure.empty:
                raise TypeError(
                    f"{name} is of type {type(optimizer).__name__}, whose step needs a closure; it takes one whose step "
                    "needs none"
                )
        if scaler is not None and not all(hasattr(scaler, m) for m in ("scale", "unscale_", "step", "update")):
            raise TypeError(f"scaler is of type {type(scaler).__name__}; it takes a torch.amp.GradScaler or None")
        if not (clip_grad_norm is None or isinstance(clip_grad_norm, numbers.Real)):
            raise TypeError(f"clip_grad_norm is {clip_grad_norm!r}; it takes a positive number or None")
        shared = set(_parameters(activation_optimizer)) & set(_parameters(weight_optimizer))
        if shared:
            shapes = ", ".join(str(tuple(p.shape)) for p in shared)
            raise ValueError(
                f"weight_optimizer has {len(shared)} parameters of activation_optimizer, of shapes {shapes}; each "
                "parameter takes one optimizer"
            )
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm is {clip_grad_norm}; it takes a positive number or None")
        self.activation_optimizer = activation_optimizer
        self.weight_optimizer = weight_optimizer
        self.scaler = scaler
        self.clip_grad_norm = clip_grad_norm
        self.single_pass = single_pass

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step of both optimizers.

        Args:
            closure: runs the forward and returns the loss, a tensor of one element, and nothing else: no ``backward``,
                no ``zero_grad``. It is called twice, or once with ``single_pass``.

        Returns:
            The loss of the weights' stage, detached. It is computed after the activation parameters' step, except with
            ``single_pass``.

        Raises:
            TypeError, ValueError: the closure is no function, or returned no tensor of one element; or a
                ``DistributedDataParallel`` lacks the option it needs.
            RuntimeError: the closure ran backward, or its loss depends on none of the parameters. After any exception,
                the parameters require gradients as they did before.
        """
        if not callable(closure):
            raise TypeError(f"closure is of type {type(closure).__name__}; it takes a function that returns the loss")
        if self.single_pass:
            return self._stage(closure, self.activation_optimizer, self.weight_optimizer)
        for optimizer, other in (
            (self.activation_optimizer, self.weight_optimizer),
            (self.weight_optimizer, self.activation_optimizer),
        ):
            frozen = _parameters(other)
            with _without_gradients(frozen), _checking_data_parallel(frozen):
                loss = self._stage(closure, optimizer)
        return loss

    def _stage(self, closure: Callable[[], Tensor], *optimizers: Optimizer) -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
            for p in _parameters(optimizer):  # zero_grad may have set it to 0
                p.grad = None
        torch.clear_autocast_cache()  # an autocast around this call caches casts of the parameters before their step
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"closure returned {type(loss).__name__}; it takes a closure that returns the loss, a tensor"
            )
        if loss.numel() != 1:
            raise ValueError(f"closure returned a tensor of shape {tuple(loss.shape)}; it takes one of one element")
        if any(map(_has_gradients, optimizers)):
            raise RuntimeError("closure ran backward; it takes one that runs the forward only")
        if loss.requires_grad:
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if not any(map(_has_gradients, optimizers)):
            raise RuntimeError(
                "closure returned a loss that depends on no parameter, of "
                f"{' and '.join(self._name(o) for o in optimizers)}, that requires a gradient"
            )
        for optimizer in optimizers:
            scaler = self.scaler if _has_gradients(optimizer) else None  # a scaler refuses an optimizer without any
            if self.clip_grad_norm is not None:
                if scaler is not None:
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(_parameters(optimizer), self.clip_grad_norm)
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        return loss.detach()

    def _name(self, optimizer: Optimizer) -> str:
        return "activation_optimizer" if optimizer is self.activation_optimizer else "weight_optimizer"
