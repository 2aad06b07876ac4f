"""The results of the authors' own code, in float64.

golden/ holds the cases named in SMALL, a part of the complete set in ../shared/golden beside the repository, which is
tested, too, if it exists. `python tests/test_golden.py` makes the small copy anew.
"""

import functools
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import leaf_cuda
from leaf_cuda.optim import DoubleStageTuner, leaf_param_groups

OWN = Path(__file__).parent / "golden"
COMPLETE = Path(__file__).parents[2] / "shared/golden"
SMALL = {
    # every granularity, and every form of LEAF and of AHAF
    "activations": ["leaf000", "leaf001", "leaf005", "ahaf006", "leaf011", "leaf012", "ahaf016", "leaf022", "leaf032"]
    + ["leaf041", "leaf050", "ahaf053", "leaf059", "ahaf060"],
    # every form, and every procedure with both optimizers
    "training": ["run00", "run03", "run05", "run10", "run14", "run17", "run27", "run28"],
}


def index(folder, kind):
    path = folder / "index.json"
    return json.loads(path.read_text()).get(kind, []) if path.exists() else []


def load(folder, kind, case):
    """The arrays of a case, by their names without the case's prefix."""
    with np.load(folder / f"{kind}.npz") as arrays:
        return {k.split(".", 1)[1]: arrays[k] for k in arrays.files if k.startswith(case["name"] + ".")}


def cases(kind):
    return [pytest.param(f, c, id=f"{f.parent.name}-{c['name']}") for f in (OWN, COMPLETE) for c in index(f, kind)]


PARAMETERS = {"leaf": ["p1", "p2", "p3", "p4"], "ahaf": ["beta", "gamma"]}


def assert_equals_golden(arrays, y, u, parameters):
    """Compares to 1e-12 of the largest magnitude in each array, not of each element: the authors' autograd computes 1 −
    σ with cancellation."""
    results = {"y": y, "grad_u": u.grad, **{f"grad_{k}": p.grad for k, p in parameters.items()}}
    for name, result in results.items():
        expected = torch.from_numpy(arrays[name])
        largest = expected.abs().max().item()
        torch.testing.assert_close(
            result.cpu(), expected, rtol=0, atol=1e-12 * largest, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("folder, case", cases("activations"))
def test_function(device, folder, case):
    arrays = load(folder, "activations", case)
    u, *parameters = (torch.from_numpy(arrays[k]).to(device).requires_grad_() for k in ("u", *PARAMETERS[case["fn"]]))
    y = getattr(leaf_cuda, case["fn"])(u, *parameters)
    y.backward(torch.from_numpy(arrays["grad_y"]).to(device))
    assert_equals_golden(arrays, y.detach(), u, dict(zip(PARAMETERS[case["fn"]], parameters)))


@pytest.mark.parametrize("folder, case", cases("activations"))
def test_module(device, folder, case):
    """The authors' constructor arguments, and their parameters as a checkpoint."""
    arrays = load(folder, "activations", case)
    kind = {"leaf": leaf_cuda.LEAF, "ahaf": leaf_cuda.AHAF}[case["fn"]]
    initial = "SiLU" if case["init"] == "random" else case["init"]
    module = kind(size=tuple(case["param_shape"]), init_as=initial, device=device, dtype=torch.float64)
    checkpoint = {k: torch.from_numpy(arrays[k]) for k in PARAMETERS[case["fn"]]}
    if case["init"] != "random":
        for name, value in checkpoint.items():
            assert torch.equal(getattr(module, name).detach().cpu(), value)
    module.load_state_dict(checkpoint)
    u = torch.from_numpy(arrays["u"]).to(device).requires_grad_()
    y = module(u)
    y.backward(torch.from_numpy(arrays["grad_y"]).to(device))
    assert_equals_golden(arrays, y.detach(), u, dict(module.named_parameters()))


# The authors' settings, and the factor by which the rate of p2 and p4 is lower with "p24_slow".
OPTIMIZERS = {
    "adam": (functools.partial(torch.optim.Adam, lr=1e-3), 1e-3, 1000),
    "rmsprop": (functools.partial(torch.optim.RMSprop, lr=1e-4, alpha=0.9, eps=1e-7), 1e-4, 10),
}


@pytest.mark.parametrize("folder, case", cases("training"))
def test_training(folder, case):
    """30 minibatches of scikit-learn's digits, in order and starting over at their end: every loss, and every parameter
    at the end."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = torch.from_numpy(digits.data / 16), torch.from_numpy(digits.target)
    arrays = {k: torch.from_numpy(a) for k, a in load(folder, "training", case).items()}
    act1 = leaf_cuda.LEAF(size=(32,), init_as=case["init"])
    model = nn.Sequential(OrderedDict(fc1=nn.Linear(64, 32), act1=act1, fc2=nn.Linear(32, 10))).double()
    model.load_state_dict({k.removeprefix("init."): a for k, a in arrays.items() if k.startswith("init.")})

    optimizer, lr, slower = OPTIMIZERS[case["optimizer"]]
    weights, *activations = leaf_param_groups(model, lr, p24_lr=lr / slower if case["p24_slow"] else None)
    tuner = DoubleStageTuner(optimizer(activations), optimizer([weights]), single_pass=not case["two_stage"])
    losses = []
    size = case["batch_size"]
    for step in range(case["steps"]):
        i = (case["start"] + step * size) % (len(images) - size)
        x, label = images[i : i + size], labels[i : i + size]
        losses.append(tuner.step(lambda x=x, label=label: nn.functional.cross_entropy(model(x), label)))
    torch.testing.assert_close(torch.stack(losses), arrays["losses"], rtol=1e-9, atol=0)
    # Relative to each tensor's largest value: where a gradient is near 0, Adam's division by its root mean square
    # magnifies rounding errors. So does ReLU's p3 = 2^16 for those of fc1's products, which differ from processor to
    # processor: on one, the plain formula is 8.9e-9 away, too.
    tolerance = 1e-7 if case["init"] == "ReLU" else 1e-12
    for name, p in model.state_dict().items():
        expected = arrays[f"final.{name}"]
        atol = tolerance * expected.abs().max().item()
        torch.testing.assert_close(p, expected, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.skipif(not COMPLETE.exists(), reason="../shared/golden is not there")
@pytest.mark.parametrize("kind", SMALL)
def test_small_copy(kind):
    complete = {c["name"]: c for c in index(COMPLETE, kind)}
    assert sorted(c["name"] for c in index(OWN, kind)) == sorted(SMALL[kind])
    for case in index(OWN, kind):
        assert case == complete[case["name"]]
        own, original = load(OWN, kind, case), load(COMPLETE, kind, case)
        assert own.keys() == original.keys()
        assert all(np.array_equal(own[k], original[k]) for k in own)


def make_small_copy():
    OWN.mkdir(exist_ok=True)
    chosen = {kind: [c for c in index(COMPLETE, kind) if c["name"] in names] for kind, names in SMALL.items()}
    (OWN / "index.json").write_text(json.dumps(chosen, indent=1) + "\n")
    for kind, cases in chosen.items():
        arrays = {f"{c['name']}.{k}": a for c in cases for k, a in load(COMPLETE, kind, c).items()}
        np.savez_compressed(OWN / f"{kind}.npz", **arrays)


if __name__ == "__main__":
    make_small_copy()
