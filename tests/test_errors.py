"""Promise 7: what cannot be computed raises at the call, naming the argument, what it got and what it takes."""

import pytest
import torch

import leaf_cuda
from leaf_cuda import AHAF, LEAF, ahaf, leaf

BACKWARD = torch.ops.leaf_cuda.leaf_backward
MASK = [True] * 5


def u(dtype=torch.float32):
    return torch.zeros(4, 5, dtype=dtype)


def p(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape or (1,), dtype=dtype, device=device)


#: name → (call, exception, [the argument, what it got, what it takes]).
CASES = {
    "integer u": (
        lambda: leaf(u(torch.int32), p(), None, p(), None),
        TypeError,
        ["u ", "torch.int32", "torch.float64, torch.float32, torch.bfloat16"],
    ),
    "integer u, numbers": (
        lambda: leaf(u(torch.int32), 1, None, 1, None),
        TypeError,
        ["u ", "torch.int32", "torch.float32"],
    ),
    "bool u": (lambda: leaf(u(torch.bool), p(), None, p(), None), TypeError, ["u ", "torch.bool", "torch.float32"]),
    "complex u": (
        lambda: leaf(u(torch.complex64), p(), None, p(), None),
        TypeError,
        ["u ", "torch.complex64", "torch.float32"],
    ),
    "complex u, numbers": (
        lambda: leaf(u(torch.complex64), 1, None, 1, None),
        TypeError,
        ["u ", "torch.complex64", "torch.float32"],
    ),
    "float8 u": (
        lambda: leaf(u(torch.float8_e4m3fn), p(), None, p(), None),
        TypeError,
        ["u ", "torch.float8_e4m3fn", "torch.float32"],
    ),
    "float8 u, numbers": (
        lambda: leaf(u(torch.float8_e4m3fn), 1, None, 1, None),
        TypeError,
        ["u ", "torch.float8_e4m3fn", "torch.float32"],
    ),
    "sparse u": (lambda: leaf(u().to_sparse(), p(), None, p(), None), TypeError, ["u ", "Sparse", "Strided"]),
    "sparse parameter": (lambda: leaf(u(), p(), None, p(5).to_sparse(), None), TypeError, ["p3", "Sparse", "Strided"]),
    "list for u": (lambda: leaf([1.0], p(), None, p(), None), TypeError, ["u ", "list", "tensor"]),
    "array for u": (lambda: leaf(u().numpy(), p(), None, p(), None), TypeError, ["u ", "ndarray", "tensor"]),
    "None for u": (lambda: leaf(None, p(), None, p(), None), TypeError, ["u ", "NoneType", "tensor"]),
    "string": (lambda: leaf(u(), p(), "0", p(), None), TypeError, ["p2", "str", "tensor", "number", "None"]),
    "list": (lambda: leaf(u(), p(), None, p(), [0.0]), TypeError, ["p4", "list", "tensor", "number", "None"]),
    "bool": (lambda: leaf(u(), True, None, p(), None), TypeError, ["p1", "bool", "tensor", "number"]),
    "complex number": (lambda: leaf(u(), p(), None, 1j, None), TypeError, ["p3", "complex", "tensor", "number"]),
    "None for p1": (lambda: leaf(u(), None, None, p(), None), TypeError, ["p1", "NoneType", "tensor", "number"]),
    "None for p3": (lambda: leaf(u(), p(), None, None, None), TypeError, ["p3", "NoneType", "tensor", "number"]),
    "string for beta": (lambda: ahaf(u(), "1", p()), TypeError, ["ahaf: beta", "str", "tensor"]),
    "None for gamma": (lambda: ahaf(u(), p(), None), TypeError, ["ahaf: gamma", "NoneType", "tensor"]),
    "shape of gamma": (lambda: ahaf(u(), p(), p(7)), ValueError, ["ahaf: gamma", "[7]", "take 1 or"]),
    "integer parameter": (
        lambda: leaf(u(), p(), p(dtype=torch.int64), p(), None),
        TypeError,
        ["p2", "torch.int64", "torch.float32"],
    ),
    "float64 parameters": (
        lambda: leaf(u(), *[p(dtype=torch.float64)] * 4),
        TypeError,
        ["p1", "torch.float64", "u ", "torch.float32"],
    ),
    "half parameters, a number": (
        lambda: leaf(u(), p(dtype=torch.bfloat16), None, 1.0, None),
        TypeError,
        ["p1", "torch.bfloat16", "u ", "torch.float32"],
    ),
    "half parameters of another type, a number": (
        lambda: leaf(u(torch.bfloat16), p(dtype=torch.bfloat16), 0.0, p(dtype=torch.float16), None),
        TypeError,
        ["p3", "torch.float16", "u ", "torch.bfloat16"],
    ),
    "number for backend_for": (lambda: leaf_cuda.backend_for(3), TypeError, ["tensor ", "int", "torch.Tensor"]),
    "one float64 parameter": (
        lambda: leaf(u(), p(), None, p(), p(dtype=torch.float64)),
        TypeError,
        ["p4", "torch.float64", "torch.float32"],
    ),
    "float32 parameters, float64 u": (
        lambda: leaf(u(torch.float64), *[p()] * 4),
        TypeError,
        ["p1", "torch.float32", "u ", "torch.float64"],
    ),
    "half parameters, float32 u": (
        lambda: leaf(u(), *[p(dtype=torch.float16)] * 4),
        TypeError,
        ["p1", "torch.float16", "u ", "torch.float32"],
    ),
    "float64 parameters, half u": (
        lambda: leaf(u(torch.float16), *[p(dtype=torch.float64)] * 4),
        TypeError,
        ["p1", "torch.float64", "torch.float16 or torch.float32"],
    ),
    "bfloat16 parameters, float16 u": (
        lambda: leaf(u(torch.float16), *[p(dtype=torch.bfloat16)] * 4),
        TypeError,
        ["p1", "torch.bfloat16", "torch.float16 or torch.float32"],
    ),
    "mixed parameters": (
        lambda: leaf(u(torch.float16), p(dtype=torch.float16), None, p(), None),
        TypeError,
        ["p3", "torch.float32", "p1", "torch.float16", "one dtype"],
    ),
    "parameter elsewhere": (
        lambda: leaf(u(), p(), None, p(device="meta"), None),
        ValueError,
        ["p3", "meta", "u ", "cpu"],
    ),
    "u elsewhere": (lambda: leaf(u().to("meta"), p(), None, p(), None), ValueError, ["p1", "cpu", "u ", "meta"]),
    "channels not on the right": (lambda: leaf(u(), p(4), None, p(), None), ValueError, ["p1", "[4]", "[4, 5]"]),
    "too many dimensions": (lambda: leaf(u(), p(), p(2, 4, 5), p(), None), ValueError, ["p2", "[2, 4, 5]", "[4, 5]"]),
    "would enlarge u": (lambda: leaf(u()[:1], p(), None, p(4, 5), None), ValueError, ["p3", "[4, 5]", "[1, 5]"]),
    "no elements": (lambda: leaf(u(), p(), None, p(), p(0)), ValueError, ["p4", "[0]", "[4, 5]"]),
    "operator": (
        lambda: torch.ops.leaf_cuda.leaf_forward(u(), p(), None, p(4), None),
        ValueError,
        ["p3", "[4]", "[4, 5]"],
    ),
    "operator without p1": (
        lambda: torch.ops.leaf_cuda.leaf_forward(u().requires_grad_(), None, None, p(), None),
        TypeError,
        ["leaf: p1 is None", "a tensor"],
    ),
    "operator without grad": (
        lambda: BACKWARD(None, u(), p(), None, p(), None, MASK),
        TypeError,
        ["leaf_backward: grad is None", "a tensor"],
    ),
    "sparse": (lambda: LEAF()(u().to_sparse()), TypeError, ["leaf: u has layout Sparse", "Strided"]),
    "nested": (lambda: LEAF()(torch.nested.nested_tensor([u(), u()])), TypeError, ["leaf: u is a nested tensor"]),
    "nested, without gradients": (
        lambda: leaf(torch.nested.nested_tensor([u(), u()]), p(), None, p(), None),
        TypeError,
        ["leaf: u is a nested tensor"],
    ),
    "quantized": (
        lambda: leaf(torch.quantize_per_tensor(u(), 0.1, 0, torch.qint8), p(), None, p(), None),
        TypeError,
        ["leaf: u is a quantized tensor"],
    ),
    "LeafFunction": (
        lambda: leaf_cuda.LeafFunction.apply(u(), p(), None, p(4), None),
        ValueError,
        ["p3", "[4]", "[4, 5]"],
    ),
    "grad's dtype": (
        lambda: BACKWARD(u(torch.float64), u(), p(), None, p(), None, MASK),
        TypeError,
        ["grad", "torch.float64", "u, torch.float32"],
    ),
    "grad's shape": (
        lambda: BACKWARD(u()[:2], u(), p(), None, p(), None, MASK),
        ValueError,
        ["grad", "[2, 5]", "[4, 5]"],
    ),
    "grad's shape broadcasts": (
        lambda: BACKWARD(p(), u(), p(), None, p(), None, MASK),
        ValueError,
        ["grad", "[1]", "[4, 5]"],
    ),
    "grad elsewhere": (
        lambda: BACKWARD(u().to("meta"), u(), p(), None, p(), None, MASK),
        ValueError,
        ["grad", "meta", "cpu"],
    ),
    "backward's parameter": (
        lambda: BACKWARD(u(), u(), p(), None, p(4), None, MASK),
        ValueError,
        ["p3", "[4]", "[4, 5]"],
    ),
    "backward's u": (
        lambda: BACKWARD(u(torch.int32), u(torch.int32), p(), None, p(), None, MASK),
        TypeError,
        ["u ", "torch.int32"],
    ),
    "wrong size of the mask": (lambda: BACKWARD(u(), u(), p(), None, p(), None, [True] * 4), RuntimeError, ["4", "5"]),
    # ---- modules
    "unknown form": (lambda: LEAF(init_as="relu"), ValueError, ["init_as", "'relu'", "'ReLU', 'SiLU'"]),
    "Swish without β": (lambda: LEAF(init_as="Swish"), ValueError, ["init_as", "'Swish'", "('Swish', beta)"]),
    "three values": (lambda: LEAF(init_as=(1, 0, 1)), ValueError, ["init_as", "(1, 0, 1)", "(p1, p2, p3, p4)"]),
    "no form": (lambda: LEAF(init_as=None), ValueError, ["init_as", "None", "'ReLU'"]),
    "number as form": (lambda: LEAF(init_as=1.5), ValueError, ["init_as", "1.5", "'ReLU'"]),
    "Swish of a string": (lambda: LEAF(init_as=("Swish", "1")), ValueError, ["init_as", "('Swish', '1')", "'ReLU'"]),
    "Swish of None": (lambda: LEAF(init_as=("Swish", None)), ValueError, ["init_as", "('Swish', None)", "'ReLU'"]),
    "None among four": (lambda: LEAF(init_as=(1, 0, 1, None)), ValueError, ["init_as", "(1, 0, 1, None)", "'ReLU'"]),
    "Tanh for AHAF": (lambda: AHAF(init_as="Tanh"), ValueError, ["init_as", "'Tanh'", "AHAF"]),
    "Sigmoid for AHAF": (lambda: AHAF(init_as="Sigmoid"), ValueError, ["init_as", "'Sigmoid'", "AHAF"]),
    "Identity for AHAF": (lambda: AHAF(init_as="Identity"), ValueError, ["init_as", "'Identity'", "AHAF"]),
    "p4 for AHAF": (lambda: AHAF(init_as=(1, 0, 1, 0.5)), ValueError, ["init_as", "(1, 0, 1, 0.5)", "AHAF"]),
    "size 0": (lambda: LEAF(size=(3, 0)), ValueError, ["size", "(3, 0)", "positive"]),
    "negative size": (lambda: LEAF(size=-1), ValueError, ["size", "-1", "positive"]),
    "size of bool": (lambda: AHAF(size=(True,)), ValueError, ["size", "(True,)", "positive"]),
    "size of strings": (lambda: LEAF(size="12"), ValueError, ["size", "'12'", "positive"]),
    "size of floats": (lambda: LEAF(size=(2.0,)), ValueError, ["size", "(2.0,)", "positive"]),
    "float for size": (lambda: LEAF(size=2.5), (TypeError, ValueError), ["size", "2.5", "positive"]),
    "None for size": (lambda: LEAF(size=None), (TypeError, ValueError), ["size", "None", "positive"]),
    "no channels": (lambda: LEAF.per_channel(0), ValueError, ["size", "(0, 1, 1)", "positive"]),
    "spatial_dims": (lambda: LEAF.per_channel(3, spatial_dims=-1), ValueError, ["spatial_dims", "-1", "integer"]),
    "float spatial_dims": (
        lambda: LEAF.per_channel(3, spatial_dims=1.5),
        ValueError,
        ["spatial_dims", "1.5", "integer"],
    ),
    "ReLU in float16": (lambda: LEAF(dtype=torch.float16), ValueError, ["dtype", "float16", "65536", "float32"]),
    "AHAF's ReLU in float16": (lambda: AHAF(dtype=torch.float16), ValueError, ["dtype", "float16", "gamma", "float32"]),
    "Swish in float16": (
        lambda: LEAF(init_as=("Swish", 1e5), dtype=torch.float16),
        ValueError,
        ["dtype", "float16", "p3"],
    ),
    "integer dtype": (lambda: LEAF(dtype=torch.int32), TypeError, ["dtype", "int32", "floating-point"]),
    "complex dtype": (lambda: LEAF(dtype=torch.complex64), TypeError, ["dtype", "complex64", "floating-point"]),
    "string for dtype": (lambda: LEAF(dtype="float32"), TypeError, ["dtype", "float32", "floating-point"]),
    "size does not fit u": (lambda: LEAF(size=(4,))(u()), ValueError, ["p1", "[4]", "[4, 5]"]),
    "module's dtype does not fit u": (
        lambda: LEAF()(u(torch.float64)),
        TypeError,
        ["p1", "torch.float32", "u ", "torch.float64"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    call, exception, words = CASES[case]
    with pytest.raises(exception) as raised:
        call()
    message = str(raised.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("number", [65536.0, 1e5, 1.702, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_beside_half_parameters_keep_their_values(dtype, number):
    """A Python number is not rounded to the other parameters' half precision: 2^16 would be infinite."""
    x = torch.linspace(-3, 3, 31, dtype=dtype)
    y = leaf(x, torch.ones(1, dtype=dtype), None, number, None)
    assert torch.equal(y, leaf(x, torch.ones(1), None, number, None))
    assert torch.equal(y, leaf(x, torch.ones(1), None, torch.tensor([number]), None))


@pytest.mark.parametrize("number", [10**400, 1e39])
def test_number_out_of_range(number):
    with pytest.raises(ValueError, match="p3 is .*; it takes a number in the range of torch.float32"):
        leaf(u(), p(), None, number, None)


@pytest.mark.parametrize("name", ["u", "p1"])
def test_forward_mode_differentiation_is_right_or_raises(name):
    """A result never lacks its tangent."""
    forward_ad = torch.autograd.forward_ad
    arguments = {"u": torch.randn(6, dtype=torch.float64), "p1": torch.ones(1, dtype=torch.float64)}
    with forward_ad.dual_level():
        arguments[name] = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        two = torch.full((1,), 2.0, dtype=torch.float64)
        try:
            y = leaf(arguments["u"], arguments["p1"], None, two, None)
        except (NotImplementedError, RuntimeError):
            return
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent is not None
    x, s = forward_ad.unpack_dual(arguments["u"]).primal, torch.sigmoid(2 * arguments["u"])
    expected = s + 2 * x * s * (1 - s) if name == "u" else x * s
    torch.testing.assert_close(tangent, expected)
