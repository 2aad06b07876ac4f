"""Promise 2: the same input gives bitwise the same output and gradients."""

import pytest
import torch
from cases import DTYPES, GRANULARITIES, LAYOUTS, draw, dtype_id, evaluate

import leaf_cuda


def assert_bitwise_equal(a, b):
    assert [t is None for t in a] == [t is None for t in b]
    for x, y in zip(a, b):
        # As bytes: 0 and -0 differ, NaN equals itself.
        assert x is None or torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))


def run(shape, shapes, dtype, device="cpu", layout="contiguous"):
    u, parameters, g = draw(shape, shapes, dtype=dtype, device=device)
    u, g = LAYOUTS[layout](u), LAYOUTS[layout](g)
    return lambda: evaluate(leaf_cuda.leaf, u, parameters, g)


# Large enough for many tasks. The first are all granularities. The rest have many rows of few parameters, or few rows
# of many parameters, whose gradients are summed over one dimension or several.
THREAD_CASES = {
    **{name: make(8, 12, 60, 61) for name, make in GRANULARITIES.items()},
    "short_rows": ((3_000, 16, 7), [(16, 1)] * 4),
    "odd_features": ((5_000, 67), [(67,)] * 4),
    "few_rows": ((4, 90_001), [(90_001,)] * 4),
    "mixed_70000": ((5, 70_000), [(1,), (70_000,), (70_000,), (5, 1)]),
    "mixed_sum_of_long": ((6, 3, 20_000), [(1,), (1, 3, 1), (3, 20_000), (20_000,)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", THREAD_CASES)
def test_number_of_threads(set_threads, case, dtype):
    compute = run(*THREAD_CASES[case], dtype)
    set_threads(1)
    expected = compute()
    for threads in (2, 3, 5):
        set_threads(threads)
        assert torch.get_num_threads() == threads
        assert_bitwise_equal(compute(), expected)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
@pytest.mark.parametrize("granularity", ["channel", "element", "no_run"])
def test_number_of_threads_and_layouts(set_threads, granularity, layout):
    compute = run(*GRANULARITIES[granularity](8, 12, 60, 61), torch.float32, layout=layout)
    set_threads(1)
    expected = compute()
    set_threads(3)
    assert_bitwise_equal(compute(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_runs(device, granularity, dtype):
    compute = run(*GRANULARITIES[granularity](8, 12, 9, 22), dtype, device)
    expected = compute()
    for _ in range(3):
        assert_bitwise_equal(compute(), expected)


@pytest.mark.emulated
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_order_of_blocks_and_threads(granularity):
    """The CUDA kernels' results do not depend on the order in which blocks and threads run."""
    emulated_backend = pytest.importorskip("emulated_backend", reason="the CUDA kernels are not emulated here")
    compute = run(*GRANULARITIES[granularity](8, 12, 9, 22), torch.float32)
    results = []
    with emulated_backend.installed():
        for blocks, threads, seed in [
            ("ascending", "ascending", 0),
            ("descending", "shuffled", 1),
            ("shuffled", "descending", 2),
        ]:
            emulated_backend.configure(blocks, threads, seed)
            results.append(compute())
    assert_bitwise_equal(results[1], results[0])
    assert_bitwise_equal(results[2], results[0])


#: Larger than leaf_cpu.cpp's kBeyondCaches (32 MiB) in float32, but not in halves.
LARGE = {
    "layer": ((2, 3, 1_500_007), [(1,)] * 4),
    "channel": ((2, 3, 1_500_007), [(3, 1)] * 4),
    "channel_of_vectors": ((2, 3, 1_500_032), [(3, 1)] * 4),
    "short_rows": ((2, 80_000, 7, 8), [(7, 1)] * 4),
    "features": ((2, 3_000, 1504), [(1504,)] * 4),
    "odd_features": ((2, 3_000, 1501), [(1501,)] * 4),
    "element": ((2, 5, 900_001), [(5, 900_001)] * 4),
}


@pytest.mark.parametrize("layout", ["contiguous", "unaligned"])
@pytest.mark.parametrize("case", LARGE)
def test_results_beyond_the_caches(set_threads, case, layout):
    """For a large u, y and du are streamed past the caches. They equal those of u's halves, and the parameters'
    gradients are the halves' sums."""
    set_threads(2)
    shape, shapes = LARGE[case]
    assert 4 * torch.Size(shape).numel() > 2**25 > 2 * torch.Size(shape).numel()
    u, parameters, g = draw(shape, shapes, dtype=torch.float32)
    u, g = LAYOUTS[layout](u), LAYOUTS[layout](g)
    y, du, *dp = evaluate(leaf_cuda.leaf, u, parameters, g)
    halves = [evaluate(leaf_cuda.leaf, u[k : k + 1], parameters, g[k : k + 1]) for k in range(2)]
    assert_bitwise_equal([y, du], [torch.cat([half[k] for half in halves]) for k in range(2)])
    for k, d in enumerate(dp):
        scale = u.numel() ** 0.5
        torch.testing.assert_close(d, halves[0][k + 2] + halves[1][k + 2], rtol=1e-5, atol=1e-7 * scale)
