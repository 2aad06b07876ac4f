"""The package is marked as typed (py.typed), so public functions have annotations, whose names can be resolved."""

import inspect
import typing
from pathlib import Path

import pytest
from torch import nn

import leaf_cuda
from leaf_cuda import convert, models, optim, plot


def callables():
    """Public functions, and the constructors and public methods of public classes, by name."""
    found = {}
    for module in (leaf_cuda, leaf_cuda.nn, convert, models, optim, plot):
        for name, value in vars(module).items():
            if name.startswith("_") or not getattr(value, "__module__", "").startswith("leaf_cuda"):
                continue
            if inspect.isfunction(value):
                found[f"{value.__module__}.{name}"] = value
            elif inspect.isclass(value):
                for base in value.__mro__:
                    if base.__module__.startswith("leaf_cuda") and base is not leaf_cuda.LeafFunction:
                        for attribute, member in vars(base).items():
                            function = getattr(member, "__func__", member)
                            if inspect.isfunction(function) and (attribute == "__init__" or attribute[0] != "_"):
                                found[f"{base.__module__}.{base.__qualname__}.{attribute}"] = function
    return found


@pytest.mark.parametrize("name", callables())
def test_annotations(name):
    function = callables()[name]
    signature = inspect.signature(function)
    typing.get_type_hints(function, localns={"Figure": object})  # matplotlib's, for plot_forms
    for parameter in signature.parameters.values():
        if parameter.name != "self" and parameter.name != "cls":
            assert parameter.annotation is not parameter.empty, parameter.name
    if not function.__name__ == "__init__":
        assert signature.return_annotation is not signature.empty


def test_star_import_keeps_torchs_nn():
    names = {}
    exec("from torch import nn\nfrom leaf_cuda import *", names)
    assert names["nn"] is nn and names["LEAF"] is leaf_cuda.LEAF


def test_package_is_marked():
    assert (Path(leaf_cuda.__file__).parent / "py.typed").exists()


def test_parameters_are_tensors():
    """They are annotated as such for type checkers, which know nothing of `nn.Module.__getattr__`."""
    hints = typing.get_type_hints(type(inspect.getattr_static(leaf_cuda.LEAF, "p1")).__get__)
    assert hints["return"] == nn.Parameter
