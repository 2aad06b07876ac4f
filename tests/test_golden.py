"""The results of the authors' own code, in float64.

golden/ holds the cases named in SMALL, out of the complete set in ../shared/golden beside the repository, which is tested
too where it exists. `python tests/test_golden.py` makes the small copy anew.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import leaf_cuda

OWN = Path(__file__).parent / "golden"
COMPLETE = Path(__file__).parents[2] / "shared/golden"
# Every granularity, and every form of LEAF and of AHAF.
SMALL = ["leaf000", "leaf001", "leaf005", "ahaf006", "leaf011", "leaf012", "ahaf016", "leaf022", "leaf032", "leaf041"]
SMALL += ["leaf050", "ahaf053", "leaf059", "ahaf060"]


def index(folder):
    path = folder / "index.json"
    return json.loads(path.read_text())["activations"] if path.exists() else []


def load(folder, case):
    """The arrays of a case, by their names without the case's."""
    with np.load(folder / "activations.npz") as arrays:
        return {k.split(".")[1]: arrays[k] for k in arrays.files if k.startswith(case["name"] + ".")}


CASES = [pytest.param(f, c, id=f"{f.parent.name}-{c['name']}") for f in (OWN, COMPLETE) for c in index(f)]
PARAMETERS = {"leaf": ["p1", "p2", "p3", "p4"], "ahaf": ["beta", "gamma"]}


def assert_equals_golden(arrays, y, u, parameters):
    """To 1e-12 of the largest magnitude in each array; not of each element, because the authors' autograd takes
    1 − σ by cancellation."""
    results = {"y": y, "grad_u": u.grad, **{f"grad_{k}": p.grad for k, p in parameters.items()}}
    for name, result in results.items():
        expected = torch.from_numpy(arrays[name])
        largest = expected.abs().max().item()
        torch.testing.assert_close(
            result.cpu(), expected, rtol=0, atol=1e-12 * largest, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("folder, case", CASES)
def test_function(device, folder, case):
    arrays = load(folder, case)
    u, *parameters = (torch.from_numpy(arrays[k]).to(device).requires_grad_() for k in ("u", *PARAMETERS[case["fn"]]))
    y = getattr(leaf_cuda, case["fn"])(u, *parameters)
    y.backward(torch.from_numpy(arrays["grad_y"]).to(device))
    assert_equals_golden(arrays, y.detach(), u, dict(zip(PARAMETERS[case["fn"]], parameters)))


@pytest.mark.parametrize("folder, case", CASES)
def test_module(device, folder, case):
    """The authors' constructor arguments, and their parameters as a checkpoint."""
    arrays = load(folder, case)
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


@pytest.mark.skipif(not COMPLETE.exists(), reason="../shared/golden is not there")
def test_small_copy():
    complete = {c["name"]: c for c in index(COMPLETE)}
    assert [c["name"] for c in index(OWN)] == sorted(SMALL, key=lambda name: name[4:])
    for case in index(OWN):
        assert case == complete[case["name"]]
        own, original = load(OWN, case), load(COMPLETE, case)
        assert own.keys() == original.keys()
        assert all(np.array_equal(own[k], original[k]) for k in own)


def make_small_copy():
    cases = [c for c in index(COMPLETE) if c["name"] in SMALL]
    OWN.mkdir(exist_ok=True)
    (OWN / "index.json").write_text(json.dumps({"activations": cases}, indent=1) + "\n")
    arrays = {f"{c['name']}.{k}": a for c in cases for k, a in load(COMPLETE, c).items()}
    np.savez_compressed(OWN / "activations.npz", **arrays)


if __name__ == "__main__":
    make_small_copy()
