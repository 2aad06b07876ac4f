"""LEAF in place of the fixed activations of an existing model."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from ._types import Form
from .fixed_activations import FIXED, module_type
from .functional import arithmetic_dtype, leaf
from .modules import AHAF, LEAF, LearnableActivation, check_model, form_values, has_hooks, size_of
from .optim import split_activation_parameters
from .recurrent import Recurrent
from .tracing import (
    called_name,
    calls_of,
    fixed_equal_to,
    modes_of,
    names_an_activation,
    set_modes,
    trace,
    with_forward,
)


@dataclass(frozen=True)
class Replaced:
    """One activation that was replaced.

    ``name`` is its name in the model; ``old`` and ``new`` describe both activations. ``difference`` is their largest
    difference over [-10, 10], in float64; None if the old one has parameters (0 for an AHAF), is on the meta device, or
    takes no such input. ``calls`` is how often the run with ``example_inputs`` called it; None without example inputs.
    """

    name: str
    old: str
    new: str
    difference: float | None
    calls: int | None = None


@dataclass(frozen=True)
class Kept:
    """What was not replaced, and why."""

    name: str
    old: str
    reason: str


@dataclass
class Report:
    """What :func:`replace_activations` did. ``str(report)`` is for reading.

    ``output_difference`` is the largest difference between the model's outputs for ``example_inputs`` before and after,
    and ``largest_output`` the largest absolute value of those before. Both are None without example inputs, or if the
    model returned no tensors that have values.
    """

    replaced: list[Replaced] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    output_difference: float | None = None
    largest_output: float | None = None

    def __str__(self) -> str:
        count = len(self.replaced)
        lines = [f"{count} activation{'s' * (count > 1)} replaced" if self.replaced else "nothing replaced"]
        for r in self.replaced:
            difference = "" if r.difference is None else f", within {r.difference:.1e}"
            calls = {None: "", 0: ", not called with example_inputs", 1: ""}.get(r.calls, f", for {r.calls} calls")
            lines.append(f"  {r.name}: {r.old} -> {r.new}{difference}{calls}")
        if self.kept:
            lines.append(f"{len(self.kept)} kept")
            lines += [f"  {k.name}: {k.old}: {k.reason}" for k in self.kept]
        if self.output_difference is not None:
            of = f", of outputs up to {self.largest_output:.1e}"
            lines.append(f"the model's output differs by at most {self.output_difference:.1e}{of}")
        return "\n".join(lines)


def replace_activations(
    model: nn.Module,
    kind: type[LearnableActivation] = LEAF,
    *,
    granularity: str = "layer",
    channel_dim: int = 1,
    example_inputs: Tensor | tuple | Mapping | None = None,
    rules: Mapping[str | type[nn.Module], Form | Mapping | None] | None = None,
) -> Report:
    """Replaces the fixed activations of ``model``, in place, by LEAF of the same form, and AHAF by the LEAF equal to it.

    nn.ReLU, SiLU, Tanh and Sigmoid keep their values (ReLU within 5e-6), GELU, Hardswish and Hardsigmoid nearly. They
    are found as modules, also of other classes that compute the same, as those of transformers and timm; as functions
    kept in attributes (``self.act = F.gelu``); and as calls (``F.relu(x)``, ``x.tanh()``) in a ``forward`` that torch.fx
    can trace and that does the same at each call. A ``forward`` is left alone if what it does depends on its inputs,
    their types, which of its arguments are given, grad mode, autocast, or the mode of a child; or if it draws random
    numbers, changes what the module holds, or has a ``with`` statement. A trace does not see ``type(x) is ...``, ``x is
    y`` and ``match x``; but it is not used if it computes something else from ``example_inputs``.

    A traced module gets the traced ``forward``, in which the values it read from its attributes are constants, and a
    new child for each replaced call. Calls in its other methods stay. ``deepcopy`` and ``state_dict`` work on it,
    ``pickle`` raises. nn.TransformerEncoder loses its fast path, which set padded positions to zero in eval mode.
    Sigmoids and tanhs that are gates or outputs are replaced like any others. Once trained, they are no longer bounded,
    as BCELoss, for example, requires: exclude those by ``rules``.

    Each place gets parameters of its own, even if one parameterless module, ``act = nn.ReLU()``, stands in several. A
    place that its module calls several times has one set of parameters for all calls. If their inputs need parameters
    of several sizes, each call gets its own set, provided that the activation is a child of the module whose
    ``forward`` calls it, and that this ``forward`` can be traced.

    LEAF never works in place. An in-place call whose input is used again after it is left alone; but of an in-place
    module, ``nn.ReLU(inplace=True)``, and of an input used again through a view, only ``output_difference`` shows it.
    Create the optimizer, and wrap in DDP or FSDP, afterwards. To load a state dict of the result, first call this with
    the same arguments on the model it came from.

    Args:
        model: any module except an activation itself, which is in no module where it could be replaced.
        kind: LEAF, or AHAF for the forms it has.
        granularity: "layer", "channel" or "element" of the input without its first dimension, the batch.
        channel_dim: the dimension of the channels in the activations' inputs: 1 in (N, C, H, W), -1 in (N, L, C).
        example_inputs: the model's input, a tuple of them, or a dict of keyword arguments. The model runs on them, in
            eval mode and without gradients: before and after, and in between to try traced forwards. "channel" and
            "element" take their sizes from these runs.
        rules: what to do with particular activations, by the module's name with wildcards (``"head.*"``) or by its
            exact type, which may be a fixed activation of your own; a type of torch.nn also stands for other classes
            that compute the same. The value is a form as LEAF's ``init_as``, None to
            leave it alone, or a dict of ``init_as``, ``kind``, ``granularity`` and ``channel_dim``. The first rule that
            matches decides.

    Returns:
        What was replaced, and what was not and why. If nothing was replaced, there is a warning, too.

    Raises:
        TypeError, ValueError: an argument is invalid, or the model is wrapped in DDP or FSDP already. After any
            exception, also one that the model itself raises in a run, the model is as it was before.
    """
    defaults = {"kind": kind, "granularity": granularity, "channel_dim": channel_dim}
    rules = _check(model, defaults, rules or {})
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if inputs is not None and not isinstance(inputs, (tuple, Mapping)):
        raise TypeError(f"example_inputs is of type {type(inputs).__name__}; it takes a tensor, a tuple or a dict")
    refused: dict[str, str] = {}
    split: dict[str, str] = {}
    equal = functools.cache(fixed_equal_to)
    report = None
    while report is None:  # places that a run refuses are kept: all is undone, and done again without them
        with contextlib.ExitStack() as undo:
            try:
                report = _Conversion(model, defaults, rules, inputs, refused, split, equal, undo).run()
                undo.pop_all()
            except _Refused as places:
                refused |= places.reasons
    if not report.replaced:
        warnings.warn(f"replace_activations: {report}", stacklevel=2)
    return report


def freeze_weights(model: nn.Module) -> list[nn.Parameter]:
    """Leaves only the parameters of LEAF and AHAF trainable: all others no longer require gradients.

    Returns the frozen ones: ``for p in frozen: p.requires_grad_(True)`` undoes it. Batch normalisation still updates
    its running statistics in train mode.

    Raises TypeError for a model that is no module, ValueError for one without LEAF and AHAF.
    """
    activations, others = split_activation_parameters(model)
    if not activations:
        raise ValueError("model has no LEAF or AHAF, so nothing would be left to train; see replace_activations")
    frozen = [p for p in others if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    return frozen


_RECURRENT = "its activations are inside torch's own recurrent step; leaf_cuda.nn has LSTM and GRU with LEAF"

#: torch's own layers that keep an activation function in an attribute. Their forwards are not traced.
_WITH_ACTIVATION = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

_OPTIONS = ("init_as", "kind", "granularity", "channel_dim")


def _check(model, defaults: dict, rules: Mapping) -> dict[str | type, dict | None]:
    """The rules, with each form as a dict of options. Raises for invalid arguments."""
    check_model(model)
    wrappers = (DistributedDataParallel,)
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        wrappers += (FSDPModule, FullyShardedDataParallel)
    for name, module in model.named_modules():
        if isinstance(module, wrappers):
            raise ValueError(
                f"model{'.' + name if name else ''} is wrapped for data parallel training ({type(module).__name__}), "
                "which would not see the new parameters; it takes the model before it is wrapped"
            )
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules is of type {type(rules).__name__}; it takes a dict")
    result = {}
    for key, value in rules.items():
        if not (isinstance(key, str) or isinstance(key, type) and issubclass(key, nn.Module)):
            raise TypeError(f"rules has the key {key!r}; it takes names of modules and types of modules")
        options = value if value is None or isinstance(value, Mapping) else {"init_as": value}
        if unknown := set(options or ()).difference(_OPTIONS):
            raise ValueError(f"rules[{key!r}] has {sorted(unknown)}; it takes {', '.join(_OPTIONS)}")
        result[key] = options
    for where, options in [("", defaults), *((f" in rules[{k!r}]", {**defaults, **v}) for k, v in result.items() if v)]:
        kind, channel_dim = options["kind"], options["channel_dim"]
        if not (isinstance(kind, type) and issubclass(kind, (LEAF, AHAF))):
            raise TypeError(f"kind{where} is {kind!r}; it takes LEAF or AHAF")
        if not isinstance(channel_dim, int) or channel_dim == 0:
            raise ValueError(f"channel_dim{where} is {channel_dim!r}; it takes an integer but 0, the batch")
        try:
            size_of(options["granularity"], (1,))
            if "init_as" in options:
                LEAF(init_as=options["init_as"], device="meta")
        except ValueError as error:
            raise ValueError(f"{error}{where}") from None
    return result


@dataclass
class _Traced:
    """A module that got a traced forward, and a child for each replaced call in it."""

    name: str
    module: nn.Module
    own: type[nn.Module]
    traced: type[nn.Module]
    calls: dict[str, nn.Module]

    def put(self) -> None:
        self.module.__class__ = self.traced
        self.module._modules.update(self.calls)

    def take_back(self) -> None:
        self.module.__class__ = self.own
        for attribute in self.calls:
            self.module._modules.pop(attribute, None)


@dataclass
class _Place:
    """An activation at its place in a parent module, and the inputs it got in the run with example inputs."""

    name: str
    parent: nn.Module
    attribute: str
    old: nn.Module
    label: str
    options: dict
    is_child: bool = False  # a module of the model itself, neither a function nor a call
    is_foreign: bool = False  # a child of another class, for which `old` stands
    of_module: str | None = None  # the name of the module that it is a call of
    inputs: list[tuple[torch.Size, torch.dtype, torch.device]] = field(default_factory=list)


class _Conversion:
    """One attempt to convert a model.

    refused: places to keep → the reason for the report, or "" for no entry. split: names of modules each of whose calls
    is to be a place → why the module itself cannot be one."""

    def __init__(
        self,
        model,
        defaults,
        rules,
        inputs,
        refused: dict[str, str],
        split: dict[str, str],
        equal: Callable[[nn.Module], nn.Module | None],
        undo: contextlib.ExitStack,
    ):
        self.model, self.defaults, self.rules, self.inputs = model, defaults, rules, inputs
        self.refused, self.split, self.equal, self.undo = refused, split, equal, undo
        self.not_split = dict(split)
        self.still_called: set[str] = set()  # those of `split` that other modules still call
        self.refused_now: dict[str, str] = {}
        self.module_calls: list[tuple[str, tuple, dict]] = []  # in traced forwards: child, args, kwargs
        self.report = Report()
        self.unmatched = dict.fromkeys(rules)
        self.activations = (*FIXED, AHAF, *(key for key in rules if isinstance(key, type)))
        self.places: list[_Place] = []
        self.traced: list[_Traced] = []
        self.inside: set[nn.Module] = set()  # submodules of activations, which are decided on as a whole

    def run(self) -> Report:
        before = self._outputs()
        modules = list(self.model.named_modules())
        if isinstance(self.model, self.activations):
            reason = "it is the model itself; it takes a module that has it, such as nn.Sequential(model)"
            self._keep("the model", self.model, reason)
        elif isinstance(self.model, (nn.RNNBase, nn.RNNCellBase)) and not isinstance(self.model, Recurrent):
            self._keep("the model", self.model, _RECURRENT)
        for name, module in modules:
            if module in self.inside:
                continue
            self._find_children(name, module)
            self._find_functions(name, module)
            self._find_calls(name, module)
        for path, reason in self.not_split.items():
            self._keep(path, self.model.get_submodule(path), reason)
        places = {place.name: place for place in self.places}
        for called, args, kwargs in self.module_calls:
            if called in places:
                self._check_call(places[called], args, kwargs, traced=True)
        self._raise_refused()
        self._try(before)
        self._outputs()
        self._replace()
        self.report.kept += [Kept(str(key), "rule", "it matches no activation") for key in self.unmatched]
        self.still_called.clear()
        after = self._outputs()
        for path in sorted(self.still_called & {place.of_module for place in self.places}):
            self._keep(path, self.model.get_submodule(path), "its calls by other modules; its own module's have theirs")
        if before is not None:
            self.report.output_difference = _difference(before, after)
            self.report.largest_output = _difference(before, [torch.zeros_like(t) for t in before])
        return self.report

    # Finding activations. Each method makes a fixed activation a module at one place: later steps know only modules.

    def _known(self, path: str, child: nn.Module) -> nn.Module:
        """The child, or the fixed activation that it computes if it is of another class. It is only itself if its place
        was refused: calls in its forward may be replaced then."""
        was_refused = path in self.refused and path not in self.split
        if isinstance(child, self.activations) or was_refused or has_hooks(child):
            return child
        return self.equal(child) or child

    def _find_children(self, name: str, module: nn.Module) -> None:
        for attribute, child in list(module._modules.items()):
            if child is None:
                continue
            path = _join(name, attribute)
            known = self._known(path, child)
            if isinstance(known, self.activations):
                self.inside.update(child.modules())
            if isinstance(child, Recurrent):
                continue
            if isinstance(child, (nn.RNNBase, nn.RNNCellBase)):
                self._keep(path, child, _RECURRENT)
            elif isinstance(child, torch.jit.ScriptModule) and not isinstance(module, torch.jit.ScriptModule):
                self.report.kept.append(Kept(path, type(child).__name__, "TorchScript cannot be changed"))
            elif (options := self._decide(path, known)) is not None:
                if has_hooks(child):
                    self._keep(path, child, "it has hooks, which would be lost")
                elif type(module).__module__ == "torch._dynamo.eval_frame":
                    self._keep(path, child, "it was compiled alone, and the compiled call would go on with it")
                else:
                    own = known if list(known.parameters()) else copy.deepcopy(known)
                    is_foreign = known is not child
                    self._add(_Place(path, module, attribute, own, repr(child), options, True, is_foreign))

    def _find_functions(self, name: str, module: nn.Module) -> None:
        """Finds functions in attributes, such as nn.TransformerEncoderLayer's, and functools.partial of them."""
        for attribute, function in list(vars(module).items()):
            called, keywords = function, {}
            if isinstance(function, functools.partial) and not function.args:
                called, keywords = function.func, function.keywords
            kind = None if isinstance(called, str) else module_type(called)
            path, label = _join(name, attribute), f"function {getattr(called, '__name__', called)}"
            if (
                kind is None
                and attribute == "activation"
                and isinstance(module, _WITH_ACTIVATION)
                and callable(function)
            ):
                reason = "no known activation; a module would be found, and a rule for its type"
                self.report.kept.append(Kept(path, label, reason))
            if kind is None or hasattr(type(module), attribute):  # a class attribute hides a module; calls are found
                continue
            try:
                fixed = kind(**keywords)
            except TypeError:  # nn.Threshold has required arguments
                self.report.kept.append(Kept(path, label, "it is called with more than its input"))
                continue
            if (options := self._decide(path, fixed)) is None:
                continue
            self.undo.callback(setattr, module, attribute, function)
            self.undo.callback(module._modules.pop, attribute, None)
            delattr(module, attribute)
            self._add(_Place(path, module, attribute, fixed, label, options))

    def _find_calls(self, name: str, module: nn.Module) -> None:
        """Finds calls of functions and Tensor methods, in forwards that torch.fx can trace."""
        leaves = (LearnableActivation, Recurrent, torch.jit.ScriptModule, *self.activations)
        cls = type(module)
        own = next(c for c in cls.__mro__ if c.__module__ != "torch.nn.utils.parametrize")
        if isinstance(module, fx.GraphModule):  # copies are made from its graph, so that a new forward would be lost
            reason = "calls in its graph are not replaced; they would be in the model that it was traced from"
            self.report.kept.append(Kept(name or "the model", "a GraphModule", reason))
            return
        if own.__module__.startswith("torch.") or isinstance(module, leaves) or cls.forward is nn.Module.forward:
            return
        paths = {attribute: _join(name, attribute) for attribute in module._modules}
        split = {a: self._known(path, module._modules[a]) for a, path in paths.items() if path in self.split}
        names = names_an_activation(cls)
        try:
            graphs = [trace(module, mode, lambda graph: names or calls_of(graph, split)) for mode in (True, False)]
        except Exception as error:  # whatever the model's own code raises on a proxy
            if not names:
                return
            message = (str(error) or type(error).__name__).splitlines()[0]
            self.report.kept.append(Kept(name or "the model", "calls in its forward", f"torch.fx: {message}"))
            return
        for node in (n for graph in graphs for n in graph.nodes if n.op == "call_module"):
            self.module_calls.append((_join(name, node.target), node.args, node.kwargs))
        found = [calls_of(graph, split) for graph in graphs]
        accepted = {}
        for node, fixed in found[0].items():
            attribute = next(a for a in _numbered(node.name) if not hasattr(module, a))
            path = _join(name, attribute)
            of_module = _join(name, node.target) if node.op == "call_module" else None
            self.not_split.pop(of_module, None)
            label = f"{called_name(node)}()" if of_module is None else repr(module._modules[node.target])
            if isinstance(fixed, str):
                self.report.kept.append(Kept(path, label, fixed))
            elif (options := self._decide(path, fixed, of_module)) is not None:
                accepted[node.name] = _Place(path, module, attribute, fixed, label, options, of_module=of_module)
        if not accepted:
            return
        if own is not cls:
            reason = "the module is parametrized; it takes its parametrizations afterwards"
            self.report.kept.append(Kept(name or "the model", "calls in its forward", reason))
            return
        if [(n.name, repr(fixed)) for n, fixed in found[0].items()] != [(n.name, repr(f)) for n, f in found[1].items()]:
            reason = "other activations in train than in eval mode"
            self.report.kept.append(Kept(name or "the model", "calls in its forward", reason))
            return
        calls = {place.attribute: place.old for place in accepted.values()}
        for attribute in calls:
            self.undo.callback(module._modules.pop, attribute, None)
        module._modules.update(calls)
        try:
            traced = with_forward(module, graphs, {node: place.attribute for node, place in accepted.items()})
        except Exception as error:  # whatever the class raises when it is subclassed
            self.refused_now |= {place.name: f"its class takes no subclass: {error}" for place in accepted.values()}
            return
        self.places += accepted.values()
        self.undo.callback(setattr, module, "__class__", cls)
        self.traced.append(_Traced(name, module, cls, traced, calls))
        self.traced[-1].put()

    def _decide(self, path: str, fixed: nn.Module, of_module: str | None = None) -> dict | None:
        """The options with which to replace `fixed` (or a call of the module named `of_module`). None to keep it, with
        a line in the report where a user would expect one."""
        kind = type(fixed)
        if not isinstance(fixed, self.activations):
            return None
        names = {path, of_module or path}
        matches = (
            key
            for key in self.rules
            if key is kind or isinstance(key, str) and any(fnmatchcase(name, key) for name in names)
        )
        key = next(matches, None)
        self.unmatched.pop(key, None)
        rule = {} if key is None else self.rules[key]
        if rule is None:
            return self._keep(path, fixed, f"rules[{key!r}] is None")
        if path in self.refused:
            reason = self.refused[path]
            return self._keep(path, fixed, reason) if reason else None
        form = FIXED[kind].form if kind in FIXED else None
        options = {"init_as": form, **self.defaults, **rule}
        if isinstance(fixed, AHAF):
            if options["kind"] is not LEAF:
                return None
            return options if kind is AHAF else self._keep(path, fixed, "a class of its own")
        if options["init_as"] is None:
            why = "no form is near it" if kind in FIXED else "a class of its own"
            return self._keep(path, fixed, f"{why}; rules={{{kind.__name__}: form}} would name one")
        try:
            options["kind"](init_as=options["init_as"], device="meta")
        except ValueError as error:
            return self._keep(path, fixed, str(error))
        return options

    def _check_call(self, place: _Place, args: tuple, kwargs: dict, traced: bool = False) -> None:
        """Refuses a place that is called with more than its input, which is all that LEAF takes. If a trace shows the
        call of a function in an attribute, that call is a place itself, and the refusal is not reported."""
        if len(args) != 1 or kwargs:
            is_place = traced and place.label.startswith("function ")
            self.refused_now[place.name] = "" if is_place else "it is called with more than its input, or by keyword"

    def _raise_refused(self) -> None:
        if self.refused_now:
            raise _Refused(self.refused_now)

    def _keep(self, path: str, fixed: nn.Module, reason: str) -> None:
        self.report.kept.append(Kept(path, repr(fixed), reason))

    def _add(self, place: _Place) -> None:
        self._set(place, place.old)
        self.places.append(place)
        if isinstance(place.parent, nn.TransformerEncoderLayer):  # its fast path does not call the activation
            self._change(place.parent, "activation_relu_or_gelu", 0)
            for encoder in self.model.modules():
                if isinstance(encoder, nn.TransformerEncoder) and place.parent in encoder.layers:
                    self._change(encoder, "use_nested_tensor", False)

    def _change(self, module: nn.Module, attribute: str, value) -> None:
        self.undo.callback(setattr, module, attribute, getattr(module, attribute))
        setattr(module, attribute, value)

    def _set(self, place: _Place, module: nn.Module) -> None:
        if place.attribute in place.parent._modules:
            self.undo.callback(
                place.parent._modules.__setitem__, place.attribute, place.parent._modules[place.attribute]
            )
        place.parent.add_module(place.attribute, module)

    def _try(self, before: list | None) -> None:
        """Takes back what computes something else from example_inputs, before the fixed activations are replaced:
        those that stand for modules of other classes, and traced forwards."""
        if before is None:
            return
        for t in self.traced:
            t.take_back()
        foreign = [place.name for place in self.places if place.is_foreign]
        if foreign and not self._gives(before):
            raise _Refused(dict.fromkeys(foreign, ""))
        if not self.traced:
            return
        expected = self._outputs()
        if not self._gives(expected):  # the model does not even repeat its own outputs
            for t in self.traced:
                t.put()
            return
        for t in self.traced:
            t.put()
        if self._gives(expected):
            return
        for t in self.traced:
            t.take_back()
        for t in self.traced:
            t.put()
            if self._gives(expected):
                continue
            t.take_back()
            self.places = [p for p in self.places if p.parent is not t.module or p.attribute not in t.calls]
            reason = "its trace by torch.fx computes something else from example_inputs"
            self.report.kept.append(Kept(t.name or "the model", "calls in its forward", reason))

    def _gives(self, expected: list) -> bool:
        """Whether the model's outputs are the expected ones. They are not if it raises."""
        try:
            return _are_near(expected, self._outputs())
        except _Refused:
            raise
        except Exception:  # whatever the model's own code raises
            return False

    # Running the model.

    def _outputs(self) -> list | None:
        """The model's outputs for example_inputs, if there are any; each place records its inputs meanwhile."""
        if self.inputs is None:
            return None
        with contextlib.ExitStack() as contexts:
            for place in self.places:
                place.inputs = []

                def hook(module, args, kwargs, place=place):
                    self._check_call(place, args, kwargs)
                    u = (*args, *kwargs.values())[0]
                    place.inputs.append((u.shape, u.dtype, u.device))

                contexts.enter_context(_removing(place.old.register_forward_pre_hook(hook, with_kwargs=True)))
            for path in self.split.keys() - self.not_split.keys():

                def still_called(module, args, path=path):
                    self.still_called.add(path)

                module = self.model.get_submodule(path)
                contexts.enter_context(_removing(module.register_forward_pre_hook(still_called)))
            contexts.enter_context(_evaluating(self.model))
            contexts.enter_context(torch.compiler.set_stance("force_eager"))  # compiled calls bypass hooks
            contexts.enter_context(torch.random.fork_rng(self._cuda_devices()))  # by itself it would start every GPU
            contexts.enter_context(torch.no_grad())
            torch.manual_seed(0)
            inputs = tree_map(_copied, dict(self.inputs) if isinstance(self.inputs, Mapping) else self.inputs)
            try:
                result = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(*inputs)
            finally:
                self._raise_refused()
            return [_values(x) for x in tree_leaves(result) if isinstance(x, Tensor)]

    def _cuda_devices(self) -> set[torch.device]:
        """Those of the model and of example_inputs."""
        tensors = (*self.model.parameters(), *self.model.buffers(), *tree_leaves(self.inputs))
        return {t.device for t in tensors if isinstance(t, Tensor) and t.is_cuda}

    # Replacing activations.

    def _replace(self) -> None:
        shared: dict[nn.Module, LearnableActivation] = {}
        for place in self.places:
            try:
                new = shared[place.old] if place.old in shared else self._new(place)
            except _KeptFor as reason:
                self.refused_now[place.name] = str(reason)
                continue
            shared[place.old] = new
            self._set(place, new)
            difference = _form_difference(place.old, new)
            calls = None if self.inputs is None else len(place.inputs)
            self.report.replaced.append(Replaced(place.name, place.label, repr(new), difference, calls))
        self._raise_refused()

    def _new(self, place: _Place) -> LearnableActivation:
        if isinstance(place.old, AHAF):
            return _leaf_of(place.old)
        options = place.options
        if options["granularity"] == "layer":
            size = (1,)
        elif self.inputs is None:
            raise ValueError(
                f"example_inputs is None; granularity {options['granularity']!r}, of {place.name}, takes an input of the "
                "model to find the sizes"
            )
        elif not place.inputs:
            raise _KeptFor("it was not called in the run with example_inputs, so its size is not known")
        else:
            sizes = {_size(shape, options) for shape, _, _ in place.inputs}
            if len(sizes) > 1:
                reason = f"it is called with inputs that take parameters of several sizes, {sorted(sizes)}"
                if list(place.old.parameters()) or not place.is_child:
                    raise _KeptFor(reason)
                self.split[place.name] = reason
                raise _KeptFor("")
            (size,) = sizes
        dtype, device = place.inputs[0][1:] if place.inputs else self._parameter_near(place)
        if not dtype.is_floating_point:
            raise _KeptFor(f"its input is of {dtype}")
        like = {"device": device, "dtype": arithmetic_dtype(dtype)}
        new = options["kind"](size=size, init_as=options["init_as"], **like)
        return new.train(place.parent.training)

    def _parameter_near(self, place: _Place) -> tuple[torch.dtype, torch.device]:
        """dtype and device of the last floating-point parameter before the place in the model's order, else of the
        first after it."""
        near, passed = None, False
        for module in self.model.modules():
            passed = passed or module is place.old
            if passed and near is not None:
                break
            near = next((p for p in module.parameters(recurse=False) if p.dtype.is_floating_point), near)
        near = torch.empty(()) if near is None else near
        return near.dtype, near.device


class _KeptFor(Exception):
    """The reason why an activation is kept."""


class _Refused(Exception):
    """Places that cannot be converted: name → why."""

    def __init__(self, reasons: dict[str, str]):
        super().__init__(reasons)
        self.reasons = reasons


def _join(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_leaf{k}" for k in range(1, 1_000_000))


def _size(shape: torch.Size, options: dict) -> tuple[int, ...]:
    granularity, dim = options["granularity"], options["channel_dim"]
    try:
        return size_of(granularity, tuple(shape[1:]), dim - 1 if dim > 0 else dim)
    except IndexError:
        raise _KeptFor(
            f"its input of shape {tuple(shape)} has no dimension for granularity {granularity!r}, channel_dim={dim}"
        ) from None


def _leaf_of(ahaf: AHAF) -> LEAF:
    """y = β·u·σ(γ·u) is LEAF with p1 = β, p3 = γ, p2 = p4 = 0."""
    new = LEAF(
        size=ahaf.size,
        init_as=ahaf.init_as,
        device=ahaf.beta.device,
        dtype=ahaf.beta.dtype,
        keep_float32=ahaf.keep_float32,
    )
    with torch.no_grad():
        for target, source in ((new.p1, ahaf.beta), (new.p3, ahaf.gamma)):
            target.copy_(source).requires_grad_(source.requires_grad)
    return new.train(ahaf.training)


def _form_difference(old: nn.Module, new: LearnableActivation) -> float | None:
    if list(old.parameters()):
        return 0.0 if isinstance(old, AHAF) else None
    if any(b.is_meta for b in old.buffers()):
        return None
    half = torch.logspace(-8, 1, 2000, dtype=torch.float64, device="cpu")  # ReLU's form differs most near 2e-5
    u = torch.cat([-half, half.new_zeros(1), half])
    with torch.no_grad():
        try:
            y = copy.deepcopy(old).cpu().eval()(u.clone())
            return (y - leaf(u, *form_values(new.init_as))).abs().max().item()
        except Exception:  # whatever the user's own class raises: it may take other inputs
            if type(old) in FIXED:
                raise
            return None


def _copied(x):
    """A copy of a tensor, which the model may change."""
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _values(t: Tensor) -> Tensor:
    """A copy as a dense tensor of real numbers."""
    if t.is_nested:
        t = t.to_padded_tensor(0.0)
    t = t.dequantize() if t.is_quantized else t.to_dense() if t.layout != torch.strided else t
    return (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).clone()


def _difference(before: list[Tensor], after: list[Tensor]) -> float | None:
    """The largest difference, NaN if one is NaN; None if no tensor has values."""
    differences = []
    for a, b in zip(before, after, strict=True):
        if not a.is_meta:
            same = (a == b) | (a.isnan() & b.isnan())
            differences.append(torch.where(same, 0, (a.double() - b.double()).abs()).max() if a.numel() else 0)
    return torch.tensor(differences, device="cpu").max().item() if differences else None


def _are_near(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether both may be results of the same computation, on a device that adds up in any order."""
    if [(t.shape, t.dtype) for t in a] != [(t.shape, t.dtype) for t in b]:
        return False
    for x, y in zip(a, b):
        if x.numel() and not x.is_meta:
            largest = x.double().nan_to_num(0, 0, 0).abs().max().item()
            if not _difference([x], [y]) <= 1e-3 * largest:
                return False
    return True


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Sets eval mode by the classes' own methods, and afterwards restores each module's mode."""
    before = modes_of(model)
    try:
        model.eval()
        yield
    finally:
        model.train(before.get(model, False))
        set_modes(before)  # a module's mode may have differed from the model's


@contextlib.contextmanager
def _removing(handle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
