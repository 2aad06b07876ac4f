"""What the tests share: forms, granularities, layouts, the truth, and how near to it a result must be."""

import torch

#: Initial forms (p1, p2, p3, p4).
FORMS = {
    "ReLU": (1.0, 0.0, 65536.0, 0.0),
    "SiLU": (1.0, 0.0, 1.0, 0.0),
    "Tanh": (0.0, 2.0, 2.0, -1.0),
    "Sigmoid": (0.0, 1.0, 1.0, 0.0),
    "CUSTOM": (1.0, 0.0, 10.0, 0.0),
    "GELU": (1.0, 0.0, 1.702, 0.0),
    "Identity": (2.0, 0.0, 0.0, 0.0),
    "Swish": (1.0, 0.0, 1.5, 0.0),
}

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

#: Every allowed pair (dtype of u, dtype of the parameters).
DTYPE_PAIRS = [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)


# ---- shapes ----------------------------------------------------------------------------------------------------------

#: name → (shape of u, shapes of p1, p2, p3, p4) for a batch of n activation maps (c, h, w). None is a missing parameter.
GRANULARITIES = {
    "layer": lambda n, c, h, w: ((n, c, h, w), [(1,)] * 4),
    "scalar": lambda n, c, h, w: ((n, c, h, w), [()] * 4),
    "channel": lambda n, c, h, w: ((n, c, h, w), [(c, 1, 1)] * 4),
    "channel_of_rows": lambda n, c, h, w: ((n, c, h * w), [(c, 1)] * 4),
    "element": lambda n, c, h, w: ((n, c, h, w), [(c, h, w)] * 4),
    "features": lambda n, c, h, w: ((n * h, c * w), [(c * w,)] * 4),
    "features_of_tokens": lambda n, c, h, w: ((n, h, c * w), [(c * w,)] * 4),
    "full": lambda n, c, h, w: ((n, c, h, w), [(n, c, h, w)] * 4),
    "no_run": lambda n, c, h, w: ((n, c, h, w), [(c, 1, w)] * 4),
    "batch": lambda n, c, h, w: ((n, c, h, w), [(n, 1, 1, 1)] * 4),
    "mixed": lambda n, c, h, w: ((n, c, h, w), [(1,), (c, 1, 1), (c, h, w), (h, 1)]),
    "mixed_long": lambda n, c, h, w: ((n, c * h * w), [(1,), (1,), (c * h * w,), (1, 1)]),
    "no_p2": lambda n, c, h, w: ((n, c, h, w), [(c, 1, 1), None, (c, 1, 1), (c, 1, 1)]),
    "no_p4": lambda n, c, h, w: ((n, c, h, w), [(c, h, w), (c, h, w), (c, h, w), None]),
    "ahaf": lambda n, c, h, w: ((n, c, h, w), [(1,), None, (1,), None]),
}


def _transposed(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def _rotated(t):
    """Dense, with the first dimension innermost."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def _unaligned(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


#: name → function that gives a tensor another layout. It keeps shape and values, but "expanded" repeats the first row.
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": _transposed,
    "rotated": _rotated,
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.size(-1)],
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "sliced_channels_last": lambda t: (
        torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last).narrow(1, 0, t.size(1))
    ),
    "expanded": lambda t: t[:1].expand(t.shape),
    "unaligned": _unaligned,
}


def draw(shape, shapes, *, dtype=torch.float64, parameter_dtype=None, device="cpu", scale=1.0, form=None):
    """u, the parameters (random, or those of a form), and g."""
    u = (scale * torch.randn(shape)).to(device, dtype)
    g = torch.randn(shape).to(device, dtype)
    parameters = [
        None
        if s is None
        else (torch.randn(s) if form is None else torch.full(s, value)).to(device, parameter_dtype or dtype)
        for s, value in zip(shapes, form or [None] * 4)
    ]
    return u, parameters, g


def gpu_is_emulated():
    """Whether the GPU is that of emulated_gpu.py."""
    return torch.cuda.is_available() and torch.cuda.get_device_name() == "emulated GPU"


# ---- results and truth ---------------------------------------------------------------------------------------------

#: The names of what `evaluate` and `truth` return.
RESULTS = ["y", "du", "dp1", "dp2", "dp3", "dp4"]


def plain(u, p1, p2, p3, p4):
    """The formula as a user of PyTorch writes it."""
    y = (p1 * u if p2 is None else p1 * u + p2) * torch.sigmoid(p3 * u)
    return y if p4 is None else y + p4


def evaluate(f, u, parameters, g):
    """[y, du, dp1, dp2, dp3, dp4] of f by autograd; None for a parameter that is None."""
    u = u.detach().requires_grad_()
    parameters = [None if p is None else p.detach().requires_grad_() for p in parameters]
    y = f(u, *parameters)
    inputs = [u, *(p for p in parameters if p is not None)]
    gradients = iter(torch.autograd.grad(y, inputs, g))
    return [y.detach(), next(gradients), *(None if p is None else next(gradients) for p in parameters)]


def _shares(u, g, p1, p2, p3, p4, s, s_bar):
    """Each element's y, du and shares of dp1, ..., dp4, by the formulas of docs/design.md."""
    line = p1 * u + p2
    slope = line * s * s_bar
    return [line * s + p4, g * (p1 * s + slope * p3), g * u * s, g * s, g * slope * u, g]


def _summed(shares, u, parameters):
    shapes = [u.shape, u.shape, *(None if p is None else p.shape for p in parameters)]

    def total(share, shape):
        if shape is None:
            return None
        share = share.reshape(u.shape) if share.dim() > u.dim() else share.expand(u.shape)
        return share.sum_to_size(shape[max(0, len(shape) - u.dim()) :]).reshape(shape)

    return [total(share, shape) for share, shape in zip(shares, shapes)]


def _in_float64(u, parameters, g):
    """u, g, p1, p2, p3, p4"""
    return [u.new_zeros((), dtype=torch.float64) if t is None else t.detach().double() for t in (u, g, *parameters)]


def truth(u, parameters, g):
    """What `evaluate` should return, in float64."""
    arguments = _in_float64(u, parameters, g)
    z = arguments[4] * arguments[0]
    return _summed(_shares(*arguments, torch.sigmoid(z), torch.sigmoid(-z)), u, parameters)


def magnitudes(u, parameters, g):
    """For each number of `truth`, what its rounding errors scale with: the sum of the absolute values of the terms
    added up in it, each times the condition number of σ there, 1 + |p3·u|."""
    arguments = _in_float64(u, parameters, g)
    z = arguments[4] * arguments[0]
    condition = 1 + z.abs()
    s, s_bar = condition * torch.sigmoid(z), torch.sigmoid(-z)
    return _summed(_shares(*(t.abs() for t in arguments), s, s_bar), u, parameters)


def assert_true(results, u, parameters, g, wanted=(True,) * 6):
    """The wanted results of `evaluate` are the truth up to rounding: to the arithmetic dtype in each of a dozen
    operations (one an exponential with an error of up to 2 ulp), and once to their own dtype."""
    arithmetic = 16 * torch.finfo(torch.promote_types(u.dtype, torch.float32)).eps
    rows = zip(RESULTS, results, truth(u, parameters, g), magnitudes(u, parameters, g), wanted)
    for name, result, true, magnitude, is_wanted in rows:
        if true is None or not is_wanted:
            assert result is None, name
            continue
        assert result.shape == true.shape, name
        own = torch.finfo(result.dtype)
        bound = arithmetic * magnitude + own.eps / 2 * true.abs() + own.smallest_normal * own.eps
        error = (result.double() - true).abs()
        assert (error <= bound).all(), f"{name}: {(error / bound).max().item():.3g} times the bound"
