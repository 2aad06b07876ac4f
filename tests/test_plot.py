"""leaf_cuda.plot: the curves that are drawn are the layers'."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from leaf_cuda import AHAF, LEAF
from leaf_cuda.plot import plot_forms

matplotlib = pytest.importorskip("matplotlib")


def test_curves(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(LEAF(size=(5,)), AHAF(init_as="SiLU"), nn.ReLU(), LEAF(size=(3, 40, 2), init_as="Tanh"))
    for p in model.parameters():
        nn.init.uniform_(p, -2, 2)
    model.append(model[0])
    figure = plot_forms(model, bounds=(-3, 2), samples=7)
    assert [a.get_title() for a in figure.axes] == ["0: 5 forms", "1: 1 form", "3: 7 of 240 forms"]
    for panel, layer, chosen in zip(
        figure.axes, (model[0], model[1], model[3]), (range(5), [0], [0, 40, 80, 120, 159, 199, 239])
    ):
        behind, *curves = panel.get_lines()
        assert behind.get_label() == f"{layer.init_as} at the start"
        u = torch.linspace(-3, 2, 401)
        assert len(curves) == min(7, layer.size[0] * 40 * 2 if len(layer.size) == 3 else layer.size[0])
        start = type(layer)(init_as=layer.init_as)
        np.testing.assert_allclose(behind.get_ydata(), start(u).detach(), atol=1e-5)
        x = u.reshape(-1, *(1 for _ in layer.size)).expand(-1, *layer.size)
        y = layer(x).detach().flatten(1).T  # a curve for each set of parameters
        for index, curve in zip(chosen, curves, strict=True):
            np.testing.assert_allclose(curve.get_xdata(), u, atol=1e-6)
            np.testing.assert_allclose(curve.get_ydata(), y[index], atol=1e-5)
        np.testing.assert_allclose(curves[-1].get_ydata(), y[-1], atol=1e-5)
    figure.savefig(tmp_path / "forms.png")
    assert (tmp_path / "forms.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "reference", ["GELU", ("Swish", 1.702), (1, 0, 1.702, 0), lambda u: u * torch.sigmoid(1.702 * u)]
)
def test_reference(reference):
    (panel,) = plot_forms(LEAF(), reference=reference).axes
    u = torch.linspace(-4, 4, 401, dtype=torch.float64)
    np.testing.assert_allclose(panel.get_lines()[0].get_ydata(), u * torch.sigmoid(1.702 * u), atol=1e-12)
    assert panel.get_title() == "LEAF: 1 form"


def drawn_reference(reference):
    figure = plot_forms(LEAF(), reference=reference)
    figure.draw_without_rendering()
    (panel,) = figure.axes
    (text,) = panel.get_legend().get_texts()
    return panel.get_lines()[0].get_ydata(), text.get_text()


def test_reference_of_a_module():
    """It is computed in the dtype of the module's parameters, which require gradients."""
    u = torch.linspace(-4, 4, 401, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        y, label = drawn_reference(LEAF(init_as="SiLU", dtype=dtype))
        np.testing.assert_allclose(y, nn.functional.silu(u), atol=torch.finfo(dtype).eps * 8)
        assert label == "reference LEAF"
    np.testing.assert_allclose(drawn_reference(nn.SiLU())[0], nn.functional.silu(u), atol=1e-15)


@pytest.mark.parametrize("name", ["_own", "cost in $ or $\\none$"])
def test_names_are_shown_as_they_are(name):
    def own(u):
        return u

    own.__name__ = name
    assert drawn_reference(own)[1] == f"reference {name}"
    figure = plot_forms(nn.ModuleDict({name: LEAF()}))
    figure.draw_without_rendering()
    assert figure.axes[0].get_title() == f"{name}: 1 form"


def test_many_sets_of_parameters():
    """More sets than float32 can count."""
    layer = LEAF(init_as="SiLU")
    count = 2**24 + 4
    for name, p in layer.named_parameters():
        setattr(layer, name, nn.Parameter(p.detach().expand(count)))
    (panel,) = plot_forms(layer, samples=3).axes
    assert panel.get_title() == f"LEAF: 3 of {count} forms"


def test_errors(monkeypatch):
    for options, error, message in (
        ({"model": 3}, TypeError, "model is of type int"),
        ({"model": nn.ReLU()}, ValueError, "model has no LEAF or AHAF"),
        ({"reference": "Cubic"}, ValueError, "reference takes a function or a form: init_as is 'Cubic'"),
        ({"reference": nn.GELU}, TypeError, "reference is <class .*GELU'>, a class; it takes a form, a function or a"),
        (
            {"model": nn.Sequential(nn.Linear(2, 2), LEAF(device="meta"))},
            ValueError,
            "model has '1' on the meta device",
        ),
        ({"samples": 0}, ValueError, "samples is 0"),
        ({"samples": True}, ValueError, "samples is True; it takes"),
        ({"bounds": (1, 1)}, ValueError, r"bounds is \(1, 1\)"),
        ({"bounds": 3}, ValueError, "bounds is 3; it takes"),
        ({"bounds": (-float("inf"), 1)}, ValueError, r"bounds is \(-inf, 1\); it takes finite"),
        ({"bounds": (0, float("inf"))}, ValueError, r"bounds is \(0, inf\); it takes finite"),
    ):
        with pytest.raises(error, match=message):
            plot_forms(**{"model": LEAF(), **options})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_forms(LEAF())
