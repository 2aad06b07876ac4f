"""Two processes on this machine, by gloo: gradients equal those of a single process."""

import copy
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import leaf_cuda
from leaf_cuda.nn import LeafLSTM, LeafMLP
from leaf_cuda.optim import DoubleStageTuner, leaf_param_groups

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not in this build of torch")

WORLD = 2


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), leaf_cuda.LEAF(size=(8,)), nn.Linear(8, 4), leaf_cuda.AHAF(init_as="SiLU")]
    return nn.Sequential(*layers).to(dtype)


def batch():
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


def loss(y):
    return y.float().square().mean()


def share(t, rank):
    return t.chunk(WORLD)[rank]


def assert_trained(model, x, tolerance, full=lambda t: t):
    """One step on x; the gradients are those of a single process with the whole batch."""
    single = network()
    loss(single(batch())).backward()
    loss(model(x)).backward()
    for p, expected in zip(model.parameters(), single.parameters(), strict=True):
        assert p.dtype == p.grad.dtype
        torch.testing.assert_close(full(p.grad).float(), expected.grad, rtol=tolerance, atol=tolerance)
    before = [full(p).clone() for p in model.parameters()]
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not all(torch.equal(full(p), b) for p, b in zip(model.parameters(), before))


# ---- what both processes run; (rank, mesh) ---------------------------------------------------------------------------


def ddp(rank, mesh):
    assert_trained(DistributedDataParallel(network()), share(batch(), rank), 1e-6)


def ddp_of_a_recurrent_layer(rank, mesh):
    torch.manual_seed(0)
    single = leaf_cuda.nn.LeafLSTM(3, 4, num_layers=2, bidirectional=True, per_unit=True, dtype=torch.float64)
    model = DistributedDataParallel(copy.deepcopy(single))
    x = torch.randn(5, 2 * WORLD, 3, dtype=torch.float64)
    loss(single(x)[0]).backward()
    loss(model(x.chunk(WORLD, 1)[rank])[0]).backward()
    for p, expected in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(p.grad.float(), expected.grad.float())


def activations(model):
    return [m for m in model if isinstance(m, leaf_cuda.LEAF | leaf_cuda.AHAF)]


def fsdp(rank, mesh, model=None, x=None, policies=None, tolerance=1e-6):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = network() if model is None else model
    of_leaf, of_model = policies or ({}, {})
    if of_leaf is not None:
        for m in activations(model):
            fully_shard(m, mesh=mesh, **of_leaf)
    fully_shard(model, mesh=mesh, **of_model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert_trained(model, share(batch(), rank) if x is None else x, tolerance, lambda p: p.full_tensor())
    assert all(p.dtype == torch.float32 for m in activations(model) for p in m.parameters())


def fsdp_of_a_recurrent_layer(rank, mesh):
    """In one FSDP group, initialised from the meta device, with and without a low-precision policy."""
    from torch.distributed.fsdp import fully_shard

    for options, tolerance in (({}, 1e-6), (policy(torch.bfloat16), 5e-2)):
        model = nn.ModuleDict(
            {
                "rnn": leaf_cuda.nn.LeafGRU(3, 4, per_unit=True, device="meta"),
                "leaf": leaf_cuda.LEAF(size=(4,), device="meta"),
            }
        )
        fully_shard(model["rnn"], mesh=mesh, **options)
        fully_shard(model["leaf"], mesh=mesh)
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        for module in model.values():
            module.reset_parameters()
        single = leaf_cuda.nn.LeafGRU(3, 4, per_unit=True)
        single.load_state_dict({k: v.full_tensor() for k, v in model["rnn"].state_dict().items()})
        assert single.leaf_l0.p2[:, 0].tolist() == [1, 1, 2]
        assert model["leaf"].p3.full_tensor().unique().item() == 2**16
        x = torch.randn(5, 2 * WORLD, 3, generator=torch.Generator().manual_seed(1))
        loss(single(x)[0]).backward()
        loss(model["rnn"](x.chunk(WORLD, 1)[rank])[0]).backward()
        for p, expected in zip(model["rnn"].parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), expected.grad, rtol=tolerance, atol=tolerance)


def policy(dtype):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}


def own():
    """Options for LEAF in a group of its own: its parameters stay in float32, and its input in the dtype it comes
    in."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return {"mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)}


def fsdp_loads_sharded_state_of_torch(rank, mesh):
    """The state dicts of nn.LSTM and of LLaMA's MLP, which have no parameters of activations."""
    from torch.distributed.fsdp import fully_shard

    class MLP(nn.Module):
        def __init__(self, features, between):
            super().__init__()
            self.gate_proj = nn.Linear(features, between, bias=False)
            self.up_proj = nn.Linear(features, between, bias=False)
            self.down_proj = nn.Linear(between, features, bias=False)

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    torch.manual_seed(0)
    x = torch.randn(3, 2, 4)
    for make, make_leaf in ((nn.LSTM, LeafLSTM), (MLP, LeafMLP)):
        for assign in (False, True):
            source, target = make(4, 8), make_leaf(4, 8)
            for module in (source, target):
                fully_shard(module, mesh=mesh)
            with torch.no_grad():
                for p in target.parameters():
                    p.fill_(0.5)
            target.load_state_dict(source.state_dict(), assign=assign)
            torch.testing.assert_close(target(x), source(x))


def fsdp_in_one_group(rank, mesh):
    fsdp(rank, mesh, policies=(None, {}))


def fsdp_with_a_policy(rank, mesh):
    fsdp(rank, mesh, policies=(None, policy(torch.bfloat16)), tolerance=5e-2)


def fsdp_with_a_float16_policy(rank, mesh):
    fsdp(rank, mesh, policies=(own(), policy(torch.float16)), tolerance=5e-3)


def fsdp_of_low_precision_weights(rank, mesh):
    model = network(torch.bfloat16)
    x = share(batch(), rank).bfloat16()
    fsdp(rank, mesh, model, x, policies=(own(), {}), tolerance=5e-2)


def fsdp_of_low_precision_weights_in_one_group(rank, mesh):
    """FSDP itself refuses this; docs/compatibility.md says what to do."""
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        fsdp(rank, mesh, network(torch.bfloat16), share(batch(), rank).bfloat16(), policies=(None, {}))


def put(tensors, mesh, placement):
    """The tensors as leaves that require gradients: DTensors with this placement, or plain tensors if it is None."""
    from torch.distributed.tensor import distribute_tensor

    placed = (t.clone() if placement is None else distribute_tensor(t, mesh, [placement]) for t in tensors)
    return [t.requires_grad_() for t in placed]


def drawn(tensors):
    """The given number of tensors of one shape, and parameters for them."""
    generator = torch.Generator().manual_seed(2)
    us = [torch.randn(4, 6, 2, generator=generator) for _ in range(tensors)]
    return us, [torch.randn(s, generator=generator) for s in ((6, 1), (1,), (), (6, 2))]


def dtensor(rank, mesh):
    from torch.distributed.tensor import Partial, Replicate, Shard

    us, parameters = drawn(1)

    def run(placement=None):
        leaves = [*put(us, mesh, placement), *put(parameters, mesh, placement and Replicate())]
        y = leaf_cuda.leaf(*leaves)
        y.sin().sum().backward()
        return [y, *(t.grad for t in leaves)]

    expected = run()
    for placement, of_gradients in {
        Shard(0): [Partial()] * 4,
        Shard(1): [Shard(0), Partial(), Partial(), Shard(0)],
        Shard(2): [Partial(), Partial(), Partial(), Shard(1)],
        Replicate(): [Replicate()] * 4,
    }.items():
        results = run(placement)
        assert [r.placements[0] for r in results] == [placement, placement, *of_gradients]
        for r, e in zip(results, expected):
            torch.testing.assert_close(r.full_tensor(), e)

    (sharded,), one = put(us, mesh, Shard(0)), torch.ones(2)
    y = leaf_cuda.ahaf(sharded, *put([one], mesh, Replicate()), 2)
    torch.testing.assert_close(y.full_tensor(), leaf_cuda.ahaf(us[0], one, 2))
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        leaf_cuda.ahaf(sharded, one, 2)


def dtensor_double_backward(rank, mesh):
    """A gradient penalty with sharded tensors, computed by the kernel on each shard."""
    from torch.distributed.tensor import Replicate, Shard

    us, parameters = drawn(1)

    def run(placement=None):
        leaves = [*put(us, mesh, placement), *put(parameters, mesh, placement and Replicate())]
        first = torch.autograd.grad(leaf_cuda.leaf(*leaves).sin().sum(), leaves, create_graph=True)
        sum(d.square().sum() for d in first).backward()
        return [t.grad for t in leaves]

    expected = run()
    for placement in (Shard(0), Shard(1), Replicate()):
        for r, e in zip(run(placement), expected):
            torch.testing.assert_close(r.full_tensor(), e)


def dtensor_glu(rank, mesh):
    from torch.distributed.tensor import Replicate, Shard

    gates, parameters = drawn(2)

    def run(placement=None, packed=False):
        given = put([torch.cat(gates, -1)] if packed else gates, mesh, placement)
        leaves = [*given, *put(parameters, mesh, placement and Replicate())]
        y = leaf_cuda.leaf_glu(*given, *[None] * packed, *leaves[len(given) :])
        y.sin().sum().backward()
        return [y, *(t.grad for t in leaves)]

    for packed in (False, True):
        expected = run(packed=packed)
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            for r, e in zip(run(placement, packed), expected):
                torch.testing.assert_close(r.full_tensor(), e)


def dtensor_of_more_gradients_each_time(rank, mesh):
    """DTensor caches an operator's shardings, and must not reuse those for other wanted gradients."""
    from torch.distributed.tensor import Replicate, Shard

    def first_order(f, leaves):
        return f(*leaves).sin().sum()

    def second_order(f, leaves):
        wanted = [t for t in leaves if t.requires_grad]
        first = torch.autograd.grad(f(*leaves).sin().sum(), wanted, create_graph=True)
        return sum(d.square().sum() for d in first)

    cases = [(leaf_cuda.leaf, 1, first_order), (leaf_cuda.leaf_glu, 2, first_order), (leaf_cuda.leaf, 1, second_order)]
    generator = torch.Generator().manual_seed(4)
    for width, shape in ((7, ()), (9, (9,))):  # shapes that no other check uses
        for f, inputs, order in cases:
            values = [torch.randn(s, generator=generator) for s in [(4, width)] * inputs + [shape] * 4]

            def gradients(placement=None):
                leaves = [
                    *put(values[:inputs], mesh, placement),
                    *put(values[inputs:], mesh, placement and Replicate()),
                ]
                for leaf in leaves:
                    leaf.requires_grad_(False)
                results = []
                for leaf in (leaves[0], *reversed(leaves[1:])):  # u first: torch 2.11 finds no mesh if v is None
                    leaf.requires_grad_()
                    results += torch.autograd.grad(order(f, leaves), [t for t in leaves if t.requires_grad])
                return results

            for r, e in zip(gradients(Shard(0)), gradients(), strict=True):
                torch.testing.assert_close(r.full_tensor(), e)


def compiled_dtensor(rank, mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    u, p = torch.randn(4, 3, generator=torch.Generator().manual_seed(3)), torch.ones(3)
    arguments = distribute_tensor(u, mesh, [Shard(0)]), distribute_tensor(p, mesh, [Replicate()])
    compiled = torch.compile(lambda u, p: leaf_cuda.ahaf(2 * u, p, p), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments).full_tensor(), torch.nn.functional.silu(2 * u))


def tuned(model, x, single_pass=False, steps=10):
    """The losses of ten steps by the double-stage procedure."""
    weights, *rest = leaf_param_groups(model, lr=1e-2, p24_lr=1e-3)
    tuner = DoubleStageTuner(torch.optim.Adam(rest), torch.optim.Adam([weights]), single_pass=single_pass)
    return [tuner.step(lambda: model(x).square().mean()) for _ in range(steps)]


def assert_tuned(model, rank, single_pass=False, full=lambda t: t):
    """Losses and parameters equal those of a single process. In float64, since Adam magnifies rounding errors."""
    single = network(torch.float64)
    expected = tuned(single, batch().double(), single_pass)
    losses = torch.stack(tuned(model, share(batch().double(), rank), single_pass))
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / WORLD, torch.stack(expected), rtol=1e-9, atol=0)
    for (name, p), q in zip(single.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(full(q), p, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def double_stage_with_ddp(rank, mesh):
    model = DistributedDataParallel(network(torch.float64), find_unused_parameters=True)
    assert_tuned(model, rank)
    assert_tuned(DistributedDataParallel(network(torch.float64)), rank, single_pass=True)


def double_stage_with_ddp_needs_its_option(rank, mesh):
    x = share(batch(), rank)
    for options in ({}, {"find_unused_parameters": True, "static_graph": True}):
        model = DistributedDataParallel(network(), **options)
        with pytest.raises(ValueError, match="takes find_unused_parameters=True"):
            tuned(model, x, steps=1)
        assert all(p.requires_grad for p in model.parameters())
    # A DistributedDataParallel without parameters of the tuner may have any options.
    other = DistributedDataParallel(nn.Linear(6, 6))
    model = DistributedDataParallel(network(), find_unused_parameters=True)
    with torch.no_grad():
        frozen = other(x)
    tuned(model, frozen, steps=1)


def double_stage_with_fsdp(rank, mesh):
    from torch.distributed.fsdp import fully_shard

    model = network(torch.float64)
    for m in activations(model):
        fully_shard(m, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert_tuned(model, rank, full=lambda p: p.full_tensor())


CHECKS = [
    ddp,
    ddp_of_a_recurrent_layer,
    double_stage_with_ddp,
    double_stage_with_ddp_needs_its_option,
    double_stage_with_fsdp,
    fsdp,
    fsdp_of_a_recurrent_layer,
    fsdp_loads_sharded_state_of_torch,
    fsdp_in_one_group,
    fsdp_with_a_policy,
    fsdp_with_a_float16_policy,
    fsdp_of_low_precision_weights,
    fsdp_of_low_precision_weights_in_one_group,
    dtensor,
    dtensor_double_backward,
    dtensor_glu,
    dtensor_of_more_gradients_each_time,
    compiled_dtensor,
]


def process(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    minute = timedelta(minutes=1)  # instead of half an hour, should one of the two fail alone
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=minute)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    failures = {}
    for check in CHECKS:
        try:
            check(rank, mesh)
        except BaseException:
            failures[check.__name__] = traceback.format_exc()
        dist.barrier()  # neither begins the next check before both have left this one
    torch.save(failures, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """check → what went wrong in it. The processes run all checks, since a start takes longer than a check."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(process, (folder,), nprocs=WORLD)
    return {k: v for rank in range(WORLD) for k, v in torch.load(f"{folder}/{rank}.pt").items()}


@pytest.mark.parametrize("check", [c.__name__ for c in CHECKS])
def test_two_processes(failures, check):
    assert check not in failures, failures[check]
