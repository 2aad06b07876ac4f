"""Parameters whose copies and sums would take more than half of the workspace: the pass runs window by window."""

import pytest
import torch
from cases import DTYPE_PAIRS, LAYOUTS, assert_true, draw, dtype_id, evaluate, plain
from test_accuracy import pools_of
from test_double_backward import draw_all, gradients_of_gradients, in_float64

import leaf_cuda

#: (shape of u, shapes of p1, ..., p4): with 16 bytes or more for each parameter of a run, more than 512 KiB in all.
CASES = {
    "gap": ((3, 20, 43, 40), [(20, 1, 40)] * 4),
    "odd_gap": ((2, 37, 31, 33), [(37, 1, 33)] * 4),
    "gap_and_inner": ((2, 37, 31, 33, 3), [(37, 1, 33, 1)] * 4),
    "gaps": ((2, 9, 8, 7, 73), [(9, 1, 7, 1), (1, 8, 1, 73), (73,), (2, 1, 1, 1, 1)]),
    "one_row": ((37_003,), [(37_003,), (1,), (37_003,), ()]),
    "two_rows": ((2, 37_003), [(1,), (1,), (37_003,), (2, 1)]),
    "short_inner": ((2, 1_500, 23, 2), [(1_500, 1, 1), None, (23, 1), None]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, parameter_dtype", DTYPE_PAIRS, ids=dtype_id)
def test_dtypes(device, case, dtype, parameter_dtype):
    u, parameters, g = draw(*CASES[case], dtype=dtype, parameter_dtype=parameter_dtype, device=device)
    assert_true(evaluate(leaf_cuda.leaf, u, parameters, g), u, parameters, g)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["gap", "odd_gap"])
def test_layouts(device, case, layout):
    u, parameters, g = draw(*CASES[case], dtype=torch.float32, device=device)
    u = LAYOUTS[layout](u)
    assert_true(evaluate(leaf_cuda.leaf, u, parameters, g), u, parameters, g)
    one = torch.tensor(0.75, device=device).expand(u.shape)
    assert_true(evaluate(leaf_cuda.leaf, u, parameters, one), u, parameters, one)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "rotated"])
def test_parameters_in_another_order(device, layout):
    """Each parameter has a value for each of u's elements but the batch's: none is expanded, all are copied."""
    u, parameters, g = draw((2, 20, 43, 40), [(20, 43, 40)] * 4, dtype=torch.float32, device=device)
    u = LAYOUTS[layout](u)
    assert_true(evaluate(leaf_cuda.leaf, u, parameters, g), u, parameters, g)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_gradients(device, case):
    drawn = draw_all(*CASES[case], device=device)
    results, expected = (gradients_of_gradients(f, *drawn) for f in (leaf_cuda.leaf, plain))
    for r, e in zip(results, expected, strict=True):
        torch.testing.assert_close(r, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "shape, parameter_shape, dtype",
    [((150, 113, 5, 25), (113, 1, 25), torch.float64), ((2, 60, 7, 40, 130), (60, 1, 40, 1), torch.bfloat16)],
    ids=["many_rows", "segments"],
)
def test_many_elements(shape, parameter_shape, dtype):
    """With two sets of parameters, windows may have more rows than one task takes, or long runs of one parameter."""
    options = {"dtype": dtype, "parameter_dtype": torch.promote_types(dtype, torch.float32)}
    drawn = draw_all(shape, [parameter_shape] * 4, **options)
    results = gradients_of_gradients(leaf_cuda.leaf, *drawn)
    expected = gradients_of_gradients(plain, *in_float64(*drawn))
    for r, e in zip(results, expected, strict=True):
        assert (r - e).norm() <= torch.finfo(dtype).eps * 64 * e.norm()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", ["gap", "two_rows"])
def test_gated_unit(device, case, packed):
    a, parameters, g = draw(*CASES[case], device=device)
    b = torch.randn_like(a)

    def formula(a, *parameters):
        return plain(a, *parameters) * b

    def fused(a, *parameters):
        given = (torch.cat([a, b], -1), None) if packed else (a, b)
        return leaf_cuda.leaf_glu(*given, *parameters)

    for r, e in zip(evaluate(fused, a, parameters, g), evaluate(formula, a, parameters, g), strict=True):
        torch.testing.assert_close(r, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["gap", "gaps", "two_rows"])
def test_promise_3(device, case):
    for name, pool in pools_of(device, *CASES[case], torch.float32, torch.float32).items():
        pool.assert_promise_3(name)


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads(set_threads, case):
    u, parameters, g = draw(*CASES[case], dtype=torch.float32)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(evaluate(leaf_cuda.leaf, u, parameters, g))
    for same in zip(*results):
        assert same[0] is None or torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
