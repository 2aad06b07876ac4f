"""Promise 3: errors against truth in higher precision, beside those of the plain PyTorch formula."""

import math

import mpmath
import pytest
import torch
from cases import DTYPE_PAIRS, FORMS, GRANULARITIES, RESULTS, draw, dtype_id, evaluate, plain, truth

import leaf_cuda

LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [pair for pair in DTYPE_PAIRS if pair[0] != torch.float64]


def half_ulp(x, dtype):
    """Half a unit in the last place of each number: the most that rounding it once to dtype costs."""
    least = torch.finfo(dtype).smallest_normal
    exponent = torch.frexp(x.double().abs().clamp(min=least)).exponent - 1
    return torch.exp2(exponent.double()) * torch.finfo(dtype).eps / 2


class Pool:
    """Root mean squares over the elements of all draws: of our errors, of the plain formula's, and of half a unit in
    the last place of the true values. This allowance is thus pooled in the same way as the errors."""

    def __init__(self):
        self.draws = []

    def add(self, ours, plain, true):
        self.draws.append((ours.flatten(), plain.flatten(), true.flatten()))

    def root_mean_squares(self):
        ours, plain, true = (torch.cat(column, -1) for column in zip(*self.draws))
        finite = true.to(ours.dtype).isfinite()
        assert torch.equal(ours.isfinite(), finite)
        pooled = [ours.double() - true, plain.double() - true, half_ulp(true, ours.dtype)]
        return [x[finite].square().mean().sqrt().item() for x in pooled]

    def assert_promise_3(self, name, factor=1.05):
        ours, theirs, half = self.root_mean_squares()
        if math.isfinite(theirs):  # else the plain formula overflowed, in float16
            bound = factor * theirs + half
            assert ours <= bound, f"{name}: {ours / bound:.3f} times the bound; ours {ours:.3g}, plain {theirs:.3g}"


def pools_of(device, shape, shapes, dtype, parameter_dtype, scale=1.0, form=None, names=RESULTS, draws=None):
    """A Pool for each of the results named: of 32 draws, or more if a parameter has only a few values, for a steady
    mean where it may be near its bound."""
    few = dtype == torch.float32 and min(math.prod(s) for s in shapes if s is not None) < 8
    pools = {}
    for _ in range(draws or (256 if few else 32)):
        u, parameters, g = draw(
            shape, shapes, dtype=dtype, parameter_dtype=parameter_dtype, device=device, scale=scale, form=form
        )
        ours = evaluate(leaf_cuda.leaf, u, parameters, g)
        theirs = evaluate(plain, u, [p if p is None else p.to(dtype) for p in parameters], g)
        for name, a, b, true in zip(RESULTS, ours, theirs, truth(u, parameters, g)):
            if true is not None and name in names:
                pools.setdefault(name, Pool()).add(a, b, true)
    return pools


@pytest.mark.parametrize(
    "dtype, parameter_dtype, scale",
    [(torch.float32, torch.float32, scale) for scale in (0.01, 1.0, 10.0)] + [(*pair, 1.0) for pair in PAIRS[1:]],
    ids=dtype_id,
)
@pytest.mark.parametrize(
    "granularity", ["layer", "channel", "element", "features", "no_run", "mixed", "no_p2", "no_p4"]
)
def test_granularities(device, granularity, dtype, parameter_dtype, scale):
    shape, shapes = GRANULARITIES[granularity](8, 4, 6, 10)
    for name, pool in pools_of(device, shape, shapes, dtype, parameter_dtype, scale).items():
        pool.assert_promise_3(name)


@pytest.mark.parametrize("granularity", ["layer", "channel", "element"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_half_precision_is_far_more_exact(device, granularity, dtype):
    """With float32 parameters: their gradients are far more exact, and y and du are the nearest numbers of u's dtype,
    except for the few where float32's own error crosses a tie."""
    shape, shapes = GRANULARITIES[granularity](8, 4, 12, 10)
    pools = pools_of(device, shape, shapes, dtype, torch.float32)
    for name in ("dp1", "dp2", "dp3", "dp4"):
        ours, theirs, _ = pools[name].root_mean_squares()
        assert ours <= theirs / 50, name
    u, parameters, g = draw(shape, shapes, dtype=dtype, parameter_dtype=torch.float32, device=device)
    true = truth(u, parameters, g)
    for result, value in list(zip(evaluate(leaf_cuda.leaf, u, parameters, g), true))[:2]:
        assert (result != value.to(dtype)).double().mean() <= 0.002


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, parameter_dtype", [PAIRS[0], PAIRS[1], PAIRS[-1]], ids=dtype_id)
def test_forms(device, form, dtype, parameter_dtype, scale):
    """Scale 100 takes p3·u beyond [-100, 100]; scale 10^-4 covers the ReLU form's bend."""
    if form == "ReLU" and dtype == torch.float16:
        pytest.skip("the plain formula has no 2^16 in float16")
    for shapes in [(1,)] * 4, [(40,)] * 4:
        for name, pool in pools_of(device, (24, 40), shapes, dtype, parameter_dtype, scale, FORMS[form]).items():
            pool.assert_promise_3(name)


@pytest.mark.parametrize("most, factor", [(100, 1.25), (4, 1.05)])
@pytest.mark.parametrize("form", ["SiLU", "Tanh", "Sigmoid", "GELU", "CUSTOM"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=dtype_id)
def test_bands(device, dtype, form, most, factor):
    """p3·u over [-100, 100], as a whole and in each of 40 bands: there an error counts even where y or a slope is
    small, and is not lost beside the large values of other bands. Within a band the factor is 1.25: e^(p3·u) takes only
    a few powers of two, so that our roundings and the plain formula's fall on unequal parts of a mantissa. Over [-4,
    4], where most values are, it is 1.05. Each element has a parameter, and so a gradient, of its own."""
    bands, draws = 40, 1000
    middle = torch.linspace(-most, most, bands).view(-1, 1)
    u = (middle + (torch.rand(bands, draws) - 0.5) * 2 * most / bands) / FORMS[form][2]
    u, g = u.to(device, dtype), torch.randn(bands, draws).to(device, dtype)
    parameters = [torch.full_like(u, value) for value in FORMS[form]]
    ours, theirs = evaluate(leaf_cuda.leaf, u, parameters, g), evaluate(plain, u, parameters, g)
    for name, a, b, true in zip(RESULTS, ours, theirs, truth(u, parameters, g)):
        whole = Pool()
        for k in range(bands):
            band = Pool()
            for pool in (whole, band):
                pool.add(a[k], b[k], true[k])
            band.assert_promise_3(f"{name} for p3·u near {middle[k].item():.1f}", factor)
        whole.assert_promise_3(name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
def test_slope_without_cancellation(device, dtype):
    """σ(z)·σ(−z) to a few units in the last place on both sides: 1 − σ(z) in float32 has no digit left by z = 17."""
    z = torch.linspace(-80, 80, 641).to(device, dtype)
    parameters = [
        torch.full((1,), v, dtype=torch.promote_types(dtype, torch.float32), device=device) for v in (0, 1, 1, 0)
    ]
    du = evaluate(leaf_cuda.leaf, z, parameters, torch.ones_like(z))[1]
    slope = torch.sigmoid(z.double()) * torch.sigmoid(-z.double())
    assert ((du.double() / slope - 1).abs() <= 8 * torch.finfo(dtype).eps).all()


# Lengths that are no multiples of vectors, and sums so long that a naive one in float32 loses digits.
@pytest.mark.parametrize(
    "shape, parameter_shape",
    [
        ((3, 10_007), (1,)),
        ((2, 8, 127), (8, 1)),
        ((1, 16, 127), (16, 1)),
        ((64, 3, 127), (3, 1)),
        ((64, 509), (509,)),
        ((700, 67), (67,)),
        ((5_000, 5), (5,)),
        ((7, 8, 1_000), (8, 1)),
        ((9, 4_009), (4_009,)),
    ],
    ids=str,
)
def test_long_sums(shape, parameter_shape):
    for name, pool in pools_of("cpu", shape, [parameter_shape] * 4, torch.float32, torch.float32).items():
        pool.assert_promise_3(name)


ON_CUDA_KERNELS = pytest.mark.parametrize(
    "device",
    [pytest.param("emulated", marks=pytest.mark.emulated), pytest.param("cuda", marks=pytest.mark.cuda)],
    indirect=True,
)


@ON_CUDA_KERNELS
@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "columns"])
def test_longest_sums(request, device, by_rows):
    """With the most terms that a CUDA thread's sum can have: if emulated, on a device of one multiprocessor."""
    if request.node.get_closest_marker("emulated"):
        pytest.importorskip("emulated_backend").configure(multiprocessors=1)
    length = 1 << (20 if device == "cuda" else 17)
    shape, parameter_shape = ((1, 8, length), (8, 1)) if by_rows else ((length, 8), (8,))
    drawn = (device, shape, [parameter_shape] * 4, torch.float32, torch.float32)
    for name, pool in pools_of(*drawn, names=("dp1", "dp2", "dp3", "dp4")).items():
        pool.assert_promise_3(name)


@ON_CUDA_KERNELS
def test_few_rows_of_many_columns(device):
    """With so many columns that each thread could sum its rows alone: eager's sums of 64 terms are more exact than a
    serial one."""
    columns = 1 << (20 if device == "cuda" else 16)
    drawn = (device, (64, columns), [(columns,)] * 4, torch.float32, torch.float32)
    for name, pool in pools_of(*drawn, names=("dp1", "dp2", "dp3", "dp4"), draws=1).items():
        pool.assert_promise_3(name)


# ---- float64 ---------------------------------------------------------------------------------------------------------


def in_mpmath(u, g, p1, p2, p3, p4):
    """[(value, the absolute values of its terms added up)] of one element's results, in 400 binary digits."""
    with mpmath.workprec(400):
        u, g, p1, p2, p3, p4 = map(mpmath.mpf, (u, g, p1, p2, p3, p4))
        s, s_bar = 1 / (1 + mpmath.exp(-p3 * u)), 1 / (1 + mpmath.exp(p3 * u))
        line, abs_line = p1 * u + p2, abs(p1 * u) + abs(p2)
        return [
            (line * s + p4, abs_line * s + abs(p4)),
            (g * (p1 * s + line * s * s_bar * p3), abs(g) * (abs(p1) * s + abs_line * s * s_bar * abs(p3))),
            (g * u * s, abs(g * u) * s),
            (g * s, abs(g) * s),
            (g * line * s * s_bar * u, abs(g * u) * abs_line * s * s_bar),
            (g, abs(g)),
        ]


def test_float64_against_mpmath(device):
    """p3·u is exact here, so that σ and the operations around it are measured. The bound is 16 units of 2^-53 of what
    is added up and, for where σ is subnormal, below 2^-1022, the spacing of those numbers."""
    z = torch.cat([torch.linspace(-745, 745, 61, dtype=torch.float64), 40 * torch.randn(20, dtype=torch.float64)])
    z = torch.cat([z, torch.tensor([0.0, 1e-300, -1e-9, 708.3, -708.4, -709.8, -744.4, 36.7, -36.8]).double()])
    p3 = 2.0 ** torch.randint(-3, 4, z.shape).double()
    u, parameters, g = draw(z.shape, [z.shape] * 4)
    u, parameters[2] = z / p3, p3
    u, g, *parameters = (t.to(device) for t in (u, g, *parameters))
    results = evaluate(leaf_cuda.leaf, u, parameters, g)
    for i, arguments in enumerate(zip(*(t.tolist() for t in (u, g, *parameters)))):
        for name, result, (value, magnitude) in zip(RESULTS, results, in_mpmath(*arguments)):
            factor = max(1, *map(abs, arguments)) ** 4
            bound = 16 * 2.0**-53 * magnitude + factor * 2.0**-1074
            error = abs(mpmath.mpf(result[i].item()) - value)
            assert error <= bound, f"{name} at {arguments}: {float(error / bound):.3g} times the bound"
