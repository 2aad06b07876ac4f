"""Each bug planted in the CUDA kernels or their planner must make a C++ test fail: of what they compute
(tests/cpp/kernels_test.cpp) or of what they move (tests/cpp/traffic_test.cpp). Each bug planted in their launches must
make a test on an emulated GPU fail (test_devices.py)."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
KERNELS, PLANNER, LAUNCH = "csrc/cuda/leaf_kernels.cuh", "csrc/cuda/launch_plan.h", "csrc/cuda/leaf_launch.cuh"
OPERATIONS, ARGS = "csrc/leaf_operations.h", "csrc/leaf_args.h"

MUTATIONS = {
    "none": (KERNELS, "", ""),
    "no barrier before a block's sum": (KERNELS, "  __syncthreads();\n  A total = 0;", "  A total = 0;"),
    "no barrier after a block's sum": (KERNELS, "  __syncthreads();  // before the next call writes\n", ""),
    "no barrier before the columns' sum": (KERNELS, "  __syncthreads();\n  const int inner", "  const int inner"),
    "no barrier in the finishing tree": (KERNELS, "      __syncthreads();\n      if (y < half)", "      if (y < half)"),
    "no barrier before shared parameters": (KERNELS, "  __syncthreads();\n  if (t.active)", "  if (t.active)"),
    "no barrier after shared parameters": (KERNELS, "  __syncthreads();  // before sums are written there\n", ""),
    "no memory for shared parameters": (LAUNCH, "!c.parameter_vectors ? 4 : 0;", "!c.parameter_vectors ? 0 : 0;"),
    "a shared parameter too few": (KERNELS, "own += c.ty;", "own += c.ty + 1;"),
    "a row's tail is one too long": (KERNELS, "(min(left, int64_t{N}))", "(min(left + 1, int64_t{N}))"),
    "a row's head is one too early": (KERNELS, "- N : offset}", "- N : offset - 1}"),
    "the neighbours' shares in a row's sums": (KERNELS, "is_wanted(e) ? total[q] : before[q]", "total[q]"),
    "the neighbours' outputs overwritten": (KERNELS, "if (!Part || shift == 0) {", "if (!Part || shift >= 0) {"),
    "a vector behind the end": (KERNELS, "r.slots.of(first_slot) - has_rest", "r.slots.of(first_slot)"),
    "an empty slot behind the end": (KERNELS, "if (left <= 0) return", "if (left < -N) return"),
    "an empty slot far from others": (KERNELS, "within - 2 * N, N}", "N, N}"),
    "the last row's rest is not done": (KERNELS, "  if (has_rest) {", "  if (false) {"),
    "the last row's rest of each parameter": (KERNELS, "!Aligned && k == r.count - 1 &&", "!Aligned &&"),
    "another thread's rest": (PLANNER, "rest_slot % threads", "(rest_slot + 1) % threads"),
    "the columns' tail is one too short": (
        KERNELS,
        "static_cast<int>(n) : 0;",
        "static_cast<int>(n) - 1 : 0;",
    ),
    "outer and inner swapped": (
        PLANNER,
        "r{plan.outer, plan.count, plan.inner, plan.pitch}",
        "r{plan.inner, plan.count, plan.outer, plan.pitch}",
    ),
    "a tile too few": (PLANNER, "c.tiles = ceil_div(width, c.tx)", "c.tiles = width / c.tx"),
    "steps too long": (PLANNER, "threads / r.vectors * r.pitch", "(threads / r.vectors + 1) * r.pitch"),
    "no step within a row": (PLANNER, "r.step_vectors * vector : 0", "0 : 0"),
    "a row too far": (PLANNER, "r.vectors * vector : 0", "0 : 0"),
    "an item too few": (PLANNER, "(which < over)", "(which + 1 < over)"),
    "an item too many in the last step": (KERNELS, "return j < n;", "return j <= n;"),
    "what is left is not done": (KERNELS, "  if (n > 0) step(", "  if (n > 1) step("),
    "every thread has the last row": (KERNELS, "first_row == c.rows.over ? ", "true ? "),
    "workspace too small": (PLANNER, "whole ? 0 : parts * sums * count", "whole ? 0 : parts * 3 * count"),
    "one share of the rows where there are no sums": (LAUNCH, "b.sums_wanted ? Op::sums : 0;", "kSums<Op>;"),
    "shares for sums where there are none": (
        PLANNER,
        "sums ? ceil_div(steps + (r.rest > 0), kMaxSerialSum) : 1",
        "ceil_div(steps, 64)",
    ),
    "splits for the length of sums alone": (PLANNER, "sums ? ceil_div(2 * rows, kMaxSerialSum) : 1", "1"),
    "blocks of few columns": (
        PLANNER,
        "const int64_t enough = std::max(",
        "const int64_t enough = kMaxThreads + std::max(",
    ),
    "long sums over rows": (PLANNER, "(r.rest > 0), kMaxSerialSum)", "(r.rest > 0), 1000 * kMaxSerialSum)"),
    "long sums over columns": (PLANNER, "c.ty * kMaxSerialSum)", "c.ty * 1000 * kMaxSerialSum)"),
    "unaligned rows taken as aligned": (PLANNER, "r.aligned = begin == vector;", "r.aligned = true;"),
    "rows with gaps taken as aligned": (
        PLANNER,
        "std::gcd(std::gcd(plan.inner, plan.pitch), vector)",
        "std::gcd(plan.inner, vector)",
    ),
    "a slot too few in a row": (PLANNER, "(plan.inner + 2 * vector - begin - 1)", "(plan.inner + vector - 1)"),
    "columns with gaps taken as aligned": (LAUNCH, " || (whole(pitch) && whole(period))", " || whole(period)"),
    "rows without their gaps": (KERNELS, "r.vectors * r.pitch + k", "r.vectors * r.count * r.inner + k"),
    "columns without their gaps": (KERNELS, "c.line : c.columns.stride;", "c.line : c.columns.width;"),
    "the first line for all": (KERNELS, "t.column / c.line : t.column,", "0 : t.column,"),
    "one pitch for all inputs": (KERNELS, "place.at(in_pitch[Op::pitched ? k : 0])", "place.at(in_pitch[0])"),
    "no look at the pitches": (PLANNER, "c.line = line ? line : c.columns.width;", "c.line = c.columns.width;"),
    "vectors across lines": (LAUNCH, "b.vector = b.vector && whole(a.line);", ""),
    "partial sums of another gradient": (KERNELS, "(q * parts + y) * count", "(q + y) * count"),
    "a term too few in the columns' sum": (KERNELS, "&& term < terms;", "&& term + 1 < terms;"),
    "a column too few in the columns' sum": (KERNELS, "n < inner;", "n + 1 < inner;"),
    "the columns' sum behind its parameter's": (KERNELS, "from[i < inner ? i : i - inner]", "from[i]"),
    "outputs written twice": (
        KERNELS,
        "if (is_there(j)) a.template run<true, false>(",
        "for (int again = is_there(j) ? (Op::sums == 0) : -1; again >= 0; --again) a.template run<true, false>(",
    ),
    "sums into half of the banks": (KERNELS, "backwards = N == 2 * Run && t.tx / 4 % 2", "backwards = false"),
    "sums from few banks": (KERNELS, "begin = lane /", "begin = 0 / "),
    "rows that are not whole vectors as rows": (PLANNER, "plan.inner % vector && column_unit", "false && column_unit"),
    "too wide a tile": (PLANNER, "column_unit(plan.inner, vector) <= kMaxThreads;", "true;"),
    "columns whatever they take": (LAUNCH, "b.columns.time < b.rows.time", "true"),
    "a period's sums in another's place": (KERNELS, "* c.period_parts * c.count + slot", "* c.count + slot"),
    "parameters in vectors across periods": (LAUNCH, " && whole(a.parameters.matrix.columns);", ";"),
    "parameters in vectors where not aligned": (LAUNCH, " && is_aligned(a.parameters.p[q]));", ");"),
    "parameters in vectors where rows are not aligned": (LAUNCH, " && whole(s.row)", ""),
    "one parameter for a vector of columns": (KERNELS, "if (N == 1 || !a.strides[q].column) return", "return"),
    "behind the last row of parameters": (ARGS, "if (++i.row == rows) i.row = 0;", "++i.row;"),
    "gradients in the plan's order": (KERNELS, "dp_strides[q].at(matrix.at(k))", "k"),
    "the forget gate by the new state": (OPERATIONS, "gradient<M>(x[1], dc * in[4],", "gradient<M>(x[1], dc * c.u,"),
    "the reset gate by the state": (OPERATIONS, "out[2] * in[3]", "out[2] * in[4]"),
    "no look at the pointers' alignment": (LAUNCH, ") % 16 == 0;", ") % 1 == 0;"),
}


COMPILE = ["g++", "-std=c++20", "-O1", "-w", "-Itests/emulation/include", "-Itests/emulation"]
COMPILE += ["-isystem", str(Path(torch.__file__).parent / "include")]
TRACE = ["-fsanitize=thread", "-fno-tree-sra"]  # for compiling the test's own file, not for linking
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
EMULATION = ["tests/emulation/cuda_emulation.cpp", "tests/emulation/memory_trace.cpp"]
# (test, flags to compile it, flags to link it): first what finds most bugs, last the sanitizers, which take long.
TESTS = [
    ("kernels_test", ["-DLEAF_STORAGE=c10::BFloat16", *TRACE], []),
    ("traffic_test", TRACE, []),
    ("kernels_test", ["-DLEAF_STORAGE=float", *TRACE], []),
    ("kernels_test", ["-DLEAF_STORAGE=c10::BFloat16", *SANITIZERS], SANITIZERS),
]


def plant(folder, path, old, new):
    """Writes the file of this repository to the folder, with the bug."""
    text = (ROOT / path).read_text()
    assert not old or text.count(old) == 1, f"{path} has the text to change {text.count(old)} times"
    (folder / path).write_text(text.replace(old, new) if old else text)


def build_and_run(name, folder):
    """Builds and runs the C++ tests with the bug planted, until one fails. Returns the last run."""
    for part in ("csrc", "tests/cpp", "tests/emulation"):
        shutil.copytree(ROOT / part, folder / part)
    plant(folder, *MUTATIONS[name])

    for test, flags, link_flags in TESTS:
        compile_test = [*COMPILE, *flags, "-c", f"tests/cpp/{test}.cpp", "-o", "test.o"]
        link = [*COMPILE, *link_flags, "test.o", *EMULATION, "-o", test]
        for command in (compile_test, link):
            subprocess.run(command, cwd=folder, check=True)
        # The test may wait for ever at a barrier.
        run = ["timeout", "1200", f"./{test}", "--stop-at-first-failure"]
        result = subprocess.run(run, cwd=folder, capture_output=True, text=True, errors="replace")
        if result.returncode:
            break
    return result


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """name → the future of its run; as many run at a time as there are cores."""
    names = [item.callspec.params["name"] for item in request.session.items if "runs" in item.fixturenames]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(build_and_run, name, tmp_path_factory.mktemp("mutation")) for name in names}


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_bug_is_caught(name, runs):
    result = runs[name].result()
    if name == "none":
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    else:
        assert result.returncode != 0, f"not caught: {result.stdout[-500:]}"


HOST, ON_STREAM = "csrc/cuda/leaf_cuda.cpp", "csrc/cuda/leaf_on_stream.cuh"
LAUNCH_MUTATIONS = {
    "none": (HOST, "", ""),
    "the current device": (HOST, "  const c10::cuda::CUDAGuard guard(u.device());\n", ""),
    "the default stream": (HOST, "c10::cuda::getCurrentCUDAStream()", "c10::cuda::getDefaultCUDAStream()"),
    "the second kernel on the default stream": (ON_STREAM, "stream>>>", "grid.y > 1 ? nullptr : stream>>>"),
    "the workspace in the host's memory": (
        ON_STREAM,
        "c10::cuda::CUDACachingAllocator::get()",
        "c10::GetAllocator(c10::kCPU)",
    ),
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of what the package is built from."""
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    folder = tmp_path_factory.mktemp("package")
    for part in ("csrc", "leaf_cuda"):
        shutil.copytree(ROOT / part, folder / part)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("bug", LAUNCH_MUTATIONS)
def test_bug_of_a_launch_is_caught(bug, package):
    path, old, new = LAUNCH_MUTATIONS[bug]
    environment = os.environ | {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "PYTHONPATH": str(package)}
    plant(package, path, old, new)
    try:
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(build, cwd=package, env=environment, check=True)
    finally:
        plant(package, path, "", "")
    tests = [sys.executable, ROOT / "tests/emulated_gpu.py", "-q", ROOT / "tests/test_devices.py"]
    result = subprocess.run(tests, cwd=package, env=environment, capture_output=True, text=True)
    said = result.stdout[-2000:] + result.stderr[-2000:]
    assert result.returncode == 0 if bug == "none" else " failed" in said, said
