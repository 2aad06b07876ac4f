"""Graphs of a network with LEAF that run elsewhere: torch.export, AOTInductor, ONNX, torch.fx, torch.jit.trace."""

import pytest
import torch
from torch import nn

import leaf_cuda
from leaf_cuda.nn import LeafGLU, LeafGRUCell, LeafLSTM, LeafMLP
from leaf_cuda.optim import split_activation_parameters


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        leaf_cuda.LEAF.per_channel(4),
        leaf_cuda.LEAF.per_element((4, 6, 6), init_as="SiLU"),
        nn.Flatten(),
        nn.Linear(144, 5),
        leaf_cuda.LEAF(init_as="Tanh"),
        leaf_cuda.AHAF(size=(5,)),
    )


def images(n):
    return torch.randn(n, 3, 8, 8)


def exported(strict=False):
    batch = {0: torch.export.Dim("batch", min=1)}
    return torch.export.export(network(), (images(2),), dynamic_shapes=(batch,), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """The graph has one operator per activation, and runs with other batch sizes."""
    program = exported(strict)
    assert str(program.graph).count("leaf_cuda.leaf_forward") == 4
    for n in (1, 2, 7):
        x = images(n)
        assert torch.equal(program.module()(x), network()(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_size_for_a_parameter(strict):
    class Net(nn.Module):
        def forward(self, u):
            return leaf_cuda.leaf(u, u.shape[0], 0.5, u.shape[1] * 0.5, u.shape[1] - 4)  # the last is 0 when traced

    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Net(), (torch.randn(3, 4),), dynamic_shapes=(sizes,), strict=strict)
    for shape in ((3, 4), (5, 2)):
        u = torch.randn(shape)
        torch.testing.assert_close(program.module()(u), Net()(u))


def test_export_of_training(tmp_path):
    torch.export.save(exported(), tmp_path / "leaf.pt2")
    module = torch.export.load(tmp_path / "leaf.pt2").module()
    x, own = images(3), network()
    module(x).square().sum().backward()
    own(x).square().sum().backward()
    for (name, a), (_, b) in zip(module.named_parameters(), own.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_aot_inductor(tmp_path):
    package = torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "leaf.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for n in (2, 5):
        x = images(n)
        torch.testing.assert_close(compiled(x), network()(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["module", "ExportedProgram"])
def test_onnx(tmp_path, source):
    """Only standard operators, with which onnxruntime computes the same numbers."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, x = tmp_path / "leaf.onnx", images(2)
    if source == "module":
        program = torch.onnx.export(network(), (x,), dynamo=True, verbose=False)
    else:
        exported = torch.export.export(network(), (x,))
        exported = exported.run_decompositions({torch.ops.leaf_cuda.leaf_forward.default: leaf_cuda.reference.leaf})
        program = torch.onnx.export(exported, (), dynamo=True, verbose=False)
    program.save(path)
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""} and not graph.functions
    session = runtime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), network()(x).detach(), rtol=1e-5, atol=1e-5)


class OwnLEAF(leaf_cuda.LEAF):
    def forward(self, u):
        return 2 * super().forward(u)


class OwnLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.cell = LeafLSTM(4, 3), LeafGRUCell(3, 3)

    def forward(self, x):
        output, (h, _) = self.rnn(x)
        return self.cell(output[-1], h[0])


@pytest.mark.parametrize(
    "make, x",
    [
        pytest.param(network, lambda: images(2), id="network"),
        pytest.param(lambda: nn.Sequential(nn.Linear(4, 4), leaf_cuda.AHAF()), lambda: torch.randn(2, 4), id="AHAF"),
        pytest.param(lambda: nn.Sequential(LeafMLP(4, 8)), lambda: torch.randn(2, 4), id="LeafMLP"),
        pytest.param(lambda: nn.Sequential(LeafGLU()), lambda: torch.randn(2, 4), id="LeafGLU"),
        pytest.param(OwnLSTM, lambda: torch.randn(5, 2, 4), id="recurrent"),
    ],
)
def test_fx(make, x):
    """LEAF stays a module of the traced copy: in its groups of parameters, and in float32 under half()."""
    model, x = make(), x()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    activations = split_activation_parameters(model)[0]
    assert [id(p) for p in split_activation_parameters(traced)[0]] == [id(p) for p in activations] and activations
    assert all(p.dtype == torch.float32 for p in split_activation_parameters(traced.half())[0])


class Called(leaf_cuda.LEAF):
    def __call__(self, u):
        return 2 * super().__call__(u)


def hooked(module, register):
    getattr(module, register)(lambda module, args, *output: 2 * (output or args)[0])
    return module


def wrapped(module):
    forward = module.forward
    module.forward = lambda u: 2 * forward(u)
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: hooked(leaf_cuda.LEAF(init_as="SiLU"), "register_forward_hook"),
        lambda: hooked(leaf_cuda.AHAF(init_as="SiLU"), "register_forward_pre_hook"),
        lambda: wrapped(leaf_cuda.LEAF(init_as="SiLU")),
        lambda: Called(init_as="SiLU"),
    ],
)
def test_fx_of_calls_that_do_more(make):
    """Once, not in the graph and in the module that it calls."""
    model, u = nn.Sequential(make()), torch.randn(2, 3)
    assert torch.equal(torch.fx.symbolic_trace(model)(u), model(u))


def test_fx_by_a_tracer_without_leaf_modules():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    model, u = nn.Sequential(leaf_cuda.LEAF()), torch.randn(2, 3)
    graph = Tracer().trace(model)
    assert leaf_cuda.leaf in [node.target for node in graph.nodes]
    assert torch.equal(torch.fx.GraphModule(model, graph)(u), model(u))


@pytest.mark.parametrize("make", [lambda: OwnLEAF(), lambda: nn.Sequential(OwnLEAF()), lambda: leaf_cuda.LEAF()])
def test_fx_looks_into(make):
    """The root of a trace, and a subclass with a forward of its own."""
    model, u = make(), torch.randn(2, 3)
    traced = torch.fx.symbolic_trace(model)
    assert leaf_cuda.leaf in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(u), model(u))


def test_fx_of_parameters():
    def function(u, p1):
        return leaf_cuda.leaf(u, p1, 0.5, 2, None)

    u, p1 = torch.randn(2, 3), torch.randn(3)
    assert torch.equal(torch.fx.symbolic_trace(function)(u, p1), function(u, p1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace():
    x = images(2)
    assert torch.equal(torch.jit.trace(network(), x)(x), network()(x))
