"""Times the fused LEAF against other ways to compute it, and against two floors, SiLU and a copy. See README.md."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

import leaf_cuda

# A GPU machine without network access may lack tabulate and tqdm (gpu_check.py): then tables are unaligned, and there
# is no progress bar.
try:
    from tabulate import tabulate
except ImportError:

    def tabulate(lines, headers, **_):
        return "\n".join(f"| {' | '.join(line)} |" for line in [headers, ["---"] * len(headers), *lines])


try:
    from tqdm import tqdm
except ImportError:
    from contextlib import nullcontext

    def tqdm(rounds=None, **_):
        bar = SimpleNamespace(update=lambda: None, set_description=lambda text: print(text, flush=True))
        return nullcontext(bar) if rounds is None else rounds

    tqdm.write = lambda text, file: print(text, file=file)

TENSORS_MOVED = {"forward": 2, "backward": 3, "both": 5}  # u, y; u, g, du: the minimum for any way to compute it
IN_CACHE_BELOW = 1 << 20  # bytes of u; such tensors stay in the cache in real use too
CACHES_FILLED = 4  # the buffers of u and g fill the last-level cache this many times,
OF_MEMORY = 1 / 32  # but at most this part of the memory: graphs of eager operations take twenty times as much

# Bounds for agreement with the fused LEAF, relative and absolute: a few roundings of the formula's intermediates in u's
# dtype. A parameter's gradient sums n terms of either sign, so its absolute bound grows with sqrt(n).
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Depending on the heap's layout, glibc's malloc returns a tensor's pages to the system and faults them in again on each
# step, for one provider and not for another. With these settings all tensors come from the heap, which is not trimmed.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}


def brief(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


@dataclasses.dataclass(frozen=True)
class Case:
    case: str
    shape: tuple[int, ...]
    parameter_shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    threads: int | None = None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def in_cache(self) -> bool:
        return self.bytes < IN_CACHE_BELOW

    def labels(self) -> tuple[str, str]:
        notes = ["channels_last"] * (self.layout == torch.channels_last) + ["in cache"] * self.in_cache
        notes += ["1 thread"] * (self.threads == 1)
        return ", ".join([brief(self.shape, self.dtype), *notes]), brief(self.parameter_shape, self.parameter_dtype)

    def __str__(self):
        return " | ".join((self.case, *self.labels()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Case):
    """One line of results, as CSV and JSON hold it: the case's fields and these."""

    phase: str
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    gb_per_s: float  # the phase's minimum of bytes (TENSORS_MOVED) over the median
    over_fused: float  # median over the rounds of this provider's time / fused LEAF's
    over_silu: float  # median over the rounds of this provider's time / SiLU's
    rounds: int
    repetitions: int  # runs per round, of which a round's time is the mean
    buffers: int  # sets of u and g that the runs rotate through; 1 means that they stay in the cache
    other_cores: float  # how many cores other processes kept busy meanwhile; 0 on CUDA, where it does not matter

    @property
    def crowded(self) -> bool:
        return self.other_cores > max(os.cpu_count() - self.threads, 0) + 0.2


def sweep(largest: int) -> list[Case]:
    """From 2^10 to `largest` elements, per layer and per feature."""
    sizes = [1 << k for k in range(10, largest.bit_length(), 2)]
    return [Case("sweep", (n // 256, 256), p) for p in ((1,), (256,)) for n in sizes]


def cases(device: str, quick: bool) -> list[Case]:
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    small = Case("small batch", (16, 64), (64,), threads=1 if device == "cpu" else None)

    def cnn(n, c, h, w, dtype=f32):
        return [Case("CNN map", (n, c, h, w), p, dtype) for p in ((1,), (c, 1, 1), (c, h, w))]

    def channels_last(n, c, h, w, dtype=f32):
        return [Case("CNN map", (n, c, h, w), p, dtype, layout=torch.channels_last) for p in ((c, 1, 1), (c, h, w))]

    def block(*shape):  # in half precision, with the parameters as the LEAF module keeps them and in u's own dtype
        return [Case("transformer block", shape, shape[-1:], t, p) for t in (bf16, f16) for p in (f32, t)]

    if device == "cpu":
        if quick:
            return [small, *cnn(128, 32, 32, 32)]
        rows = [Case("linear layer", (n, 1024), (1024,)) for n in (16384, 4096)]
        maps = [*cnn(256, 64, 32, 32), *cnn(128, 32, 32, 32), *channels_last(32, 64, 56, 56)]
        odd = cnn(64, 256, 14, 14)[1]  # rows end within a vector, as in a ResNet
        return [small, *maps, odd, *rows, *block(8, 512, 3072)]
    if quick:
        return [small, *cnn(256, 64, 64, 64), block(8, 2048, 4096)[0]]
    maps = [case for t in (f32, bf16) for case in (*cnn(256, 64, 64, 64, t), *channels_last(256, 64, 64, 64, t))]
    odd = [cnn(256, 2048, 7, 7, t)[1] for t in (f32, bf16)]
    rows = [Case("linear layer", (n, 1024), (1024,)) for n in (131072, 16384)]
    return [small, *maps, *odd, *rows, *block(8, 2048, 4096), *block(16, 2048, 8192)[::2]]


# The providers: functions of u and the four parameters, so that none pays for an nn.Module's call.


def formula(u, p1, p2, p3, p4):
    return ((p1 * u + p2) * torch.sigmoid(p3 * u) + p4).to(u.dtype)


class AuthorsWay(torch.autograd.Function):
    """Eager operations; the parameters' gradients are returned in u's size, and autograd sums them to the parameters'.

    Each intermediate is computed once, whereas the authors' own backward computes some of them twice.
    """

    @staticmethod
    def forward(ctx, u, p1, p2, p3, p4):
        ctx.save_for_backward(u, p1, p2, p3, p4)
        return formula(u, p1, p2, p3, p4)

    @staticmethod
    def backward(ctx, g):
        u, p1, p2, p3, p4 = ctx.saved_tensors
        z = p3 * u
        s = torch.sigmoid(z)
        slope = (p1 * u + p2) * s * torch.sigmoid(-z)
        return g * (p1 * s + slope * p3), g * (u * s), g * s, g * (slope * u), g * torch.ones_like(u)


FUNCTIONS = {
    "fused": leaf_cuda.leaf,
    "compile": torch.compile(formula, dynamic=False),
    "plain": formula,
    "authors": lambda *inputs: AuthorsWay.apply(*inputs),
    "silu": lambda u, *_: F.silu(u),
    "copy": lambda u, *_: u.clone(),
}
FLOORS = ("silu", "copy")  # no LEAF: nothing to verify, no parameters to train


class Bench:
    """One phase of one provider. ``sample(k)`` gives seconds per run, the mean of k runs.

    The buffers hold u, g and what a run returns. It lives until its buffer's next turn, so that results rotate too.
    """

    def __init__(self, provider: str, phase: str, case: Case, buffers: list[SimpleNamespace], parameters: list[Tensor]):
        self.function, self.phase, self.case = FUNCTIONS[provider], phase, case
        self.buffers, self.parameters = buffers, parameters
        self.trained = [] if provider in FLOORS else parameters
        self.turn = itertools.cycle(buffers).__next__
        self.step = getattr(self, phase)
        self.timer = Timer("step()", globals={"step": self.step}, num_threads=case.threads)

    def forward(self):
        b = self.turn()
        b.result = self.function(b.u, *self.parameters)

    def backward(self):
        b = self.turn()
        b.result = torch.autograd.grad(b.y, (b.u, *self.trained), b.g, retain_graph=True)

    def both(self):
        b = self.turn()
        for x in (b.u, *self.trained):
            x.grad = None
        self.function(b.u, *self.parameters).backward(b.g)

    def sample(self, k: int) -> float:
        with torch.set_grad_enabled(self.phase != "forward"):
            if self.phase == "backward":
                for b in self.buffers:
                    b.y = self.function(b.u, *self.parameters)
            seconds = self.cuda_seconds(k) if self.buffers[0].u.is_cuda else self.timer.timeit(k).median
        for b in self.buffers:
            b.y = b.result = b.u.grad = None
        return seconds

    def cuda_seconds(self, k: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(max(k // 100, 2)):
            self.step()
        # The device idles some 10 ms while the host enqueues the sample, so that no gap between launches is timed. In a
        # small batch the launches are what a user waits for, so there they are timed.
        if not self.case.in_cache:
            torch.cuda._sleep(20_000_000)
        start.record()
        for _ in range(k):
            self.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / k

    def repetitions(self, seconds: float) -> int:
        """How many runs fill a sample of that length; on CUDA, no more than can be enqueued ahead."""
        limit = 50 if self.buffers[0].u.is_cuda and not self.case.in_cache else 100_000
        k, filled = 1, 0
        while k < limit and filled < seconds / 2:
            filled = k * self.sample(k)
            k = min(max(round(k * seconds / filled), 1), limit)
        return k


def verify(case: Case, b: SimpleNamespace, parameters: list[Tensor]) -> None:
    """Raises if a provider's y or gradients are not the fused LEAF's; drops torch.compile where it cannot work."""

    def results(provider):
        y = FUNCTIONS[provider](b.u, *parameters)
        return [y.detach(), *torch.autograd.grad(y, (b.u, *parameters), b.g, retain_graph=True)]

    fused = results("fused")
    for provider in [p for p in FUNCTIONS if p != "fused" and p not in FLOORS]:
        try:
            got = results(provider)
        except Exception as error:
            if provider != "compile":
                raise
            del FUNCTIONS["compile"]
            tqdm.write(f"torch.compile is left out: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            continue
        for name, x, want in zip(("y", "du", "dp1", "dp2", "dp3", "dp4"), got, fused, strict=True):
            r = TOLERANCE[case.dtype]
            a = r * math.sqrt(b.u.numel() / want.numel())
            message = f"{case}: {name} of {provider} is not the fused LEAF's. "
            torch.testing.assert_close(x, want, rtol=r, atol=a, msg=message.__add__)


def run_case(case: Case, args: argparse.Namespace, progress: tqdm) -> list[dict[str, Row]]:
    """For each phase, the row of each provider."""
    # Before compilation: compiled CPU code has the number of threads written into it.
    torch.set_num_threads(case.threads)
    # Otherwise the ninth case would reach the recompilation limit, and silently run as eager operations.
    torch.compiler.reset()
    torch.manual_seed(0)
    cache = last_level_cache(args.device)
    rotated = min(CACHES_FILLED * cache, OF_MEMORY * memory(args.device))
    count = 1 if case.in_cache else max(2, math.ceil(rotated / (2 * case.bytes)))

    def normal() -> Tensor:
        return torch.randn(case.shape, device=args.device).to(case.dtype, memory_format=case.layout)

    buffers = [SimpleNamespace(u=normal().requires_grad_(), g=normal()) for _ in range(count)]
    parameters = [
        (form + 0.2 * torch.randn(case.parameter_shape)).to(args.device, case.parameter_dtype).requires_grad_()
        for form in (1, 0, 1, 0)
    ]
    verify(case, buffers[0], parameters)
    results = []
    for phase, tensors in TENSORS_MOVED.items():
        providers = [p for p in FUNCTIONS if p != "copy" or phase == "forward"]
        benches = {p: Bench(p, phase, case, buffers, parameters) for p in providers}
        k = {p: bench.repetitions(0.02 if args.quick else 0.04) for p, bench in benches.items()}
        others, clock = other_seconds(args.device), time.monotonic()
        runs = {p: partial(bench.sample, k[p]) for p, bench in benches.items()}
        seconds = interleaved(runs, args.rounds, progress)
        others = (other_seconds(args.device) - others) / (time.monotonic() - clock)
        results.append({})
        for p, times in seconds.items():
            p20, _, _, p80 = quantiles(times, n=5, method="inclusive")
            results[-1][p] = Row(
                **vars(case),
                phase=phase,
                provider=p,
                median_ms=median(times) * 1e3,
                p20_ms=p20 * 1e3,
                p80_ms=p80 * 1e3,
                gb_per_s=tensors * case.bytes / median(times) / 1e9,
                over_fused=median(a / b for a, b in zip(times, seconds["fused"], strict=True)),
                over_silu=median(a / b for a, b in zip(times, seconds["silu"], strict=True)),
                rounds=args.rounds,
                repetitions=k[p],
                buffers=count,
                other_cores=others,
            )
    return results


def interleaved(runs: dict[Hashable, Callable[[], float]], rounds: int, progress: tqdm) -> dict[Hashable, list[float]]:
    """Calls each run once per round, in newly shuffled order. Returns the seconds that the calls returned, by name."""
    seconds, shuffle = {name: [] for name in runs}, random.Random(0).sample
    for _ in range(rounds):
        for name in shuffle(list(runs), len(runs)):
            seconds[name].append(runs[name]())
        progress.update()
    return seconds


def memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def last_level_cache(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(t[:-1]) * units[t[-1]] for t in (f.read_text().strip() for f in files)), default=1 << 25)


def other_seconds(device: str) -> float:
    """Processor time that other processes have used; 0 where it cannot be told or does not matter."""
    if sys.platform != "linux" or device == "cuda":
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def ratio(times: list[float], others: list[float]) -> str:
    """The median of the ratios within rounds."""
    return f"{median(a / b for a, b in zip(times, others, strict=True)):.2f}"


def print_table(lines: list[list[str]], headers: list[str], what: str, args: argparse.Namespace) -> None:
    """Prints the lines, what was measured, and where; writes them to args.markdown too, if given."""
    rows = tabulate(lines, headers, tablefmt="github", disable_numparse=True)
    text = f"{rows}\n\n{what}\n\n{below_table(machine(args))}\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


def restart_with_malloc() -> None:
    """Runs this script again with MALLOC's settings, unless it has them."""
    wanted = {**MALLOC, **os.environ}
    if platform.libc_ver()[0] == "glibc" and wanted != os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


# Types of options. An invalid value is reported in one line, before anything is measured.


def at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}; it takes an integer from {least}")
        return int(text)

    return integer


def device(text: str) -> str:
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda; torch.cuda.is_available() is False")
    return text


def output_folder(text: str) -> Path:
    """Makes the folder now, so that a run does not fail at its end."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{folder} cannot be made a folder: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{folder} cannot be written to")
    return folder


def output_file(text: str) -> Path:
    """Makes the file's folder."""
    file = Path(text)
    output_folder(file.parent)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{file} is a folder")
    return file


def add_options(parser: argparse.ArgumentParser, rounds: int, least_rounds: int = 1) -> None:
    """The options that each benchmark has."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, choices=("cpu", "cuda"), default=default)
    parser.add_argument(
        "--rounds",
        type=at_least(least_rounds),
        default=rounds,
        help=f"samples of each provider, {least_rounds} or more",
    )
    parser.add_argument(
        "--threads", type=at_least(1), default=torch.get_num_threads(), help="of the CPU, where a case fixes none"
    )
    parser.add_argument("--markdown", type=output_file, metavar="FILE", help="write the table and the machine")


def parse(parser: argparse.ArgumentParser, rounds: int) -> argparse.Namespace:
    """Parses a script's own options and those that all benchmarks have; sets the threads and malloc."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_options(parser, rounds)
    args = parser.parse_args()
    if args.device == "cpu":
        restart_with_malloc()
    torch.set_num_threads(args.threads)
    return args


def machine(args: argparse.Namespace) -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        if git("status", "--porcelain", ":/", ":(top,exclude)benchmarks/results"):
            commit += "-dirty"
    except OSError:  # no git
        commit = ""
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "last_level_cache_bytes": last_level_cache(args.device),
        "system": platform.platform(),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "leaf_cuda": leaf_cuda.build_info(),
        "commit": commit or None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def below_table(m: dict, crowded: bool = False) -> str:
    build, malloc = m["leaf_cuda"], " ".join(f"{name}={value}" for name, value in m["malloc"].items())
    if m["gpu"]:
        parts = [m["gpu"], f"CUDA {build['cuda']}"]
    else:
        parts = [m["cpu"], build["cpu_instruction_set"], f"{m['cores']} cores", f"{m['threads']} threads"]
        parts.append(malloc or "default malloc")
    parts += [f"torch {m['torch']}", f"leaf_cuda {build['version']}", f"commit {m['commit']}", m["date"]]
    return ", ".join(parts) + "\n\n! measured while other processes wanted the same cores: do not trust it" * crowded


def table(results: list[dict[str, Row]], style: str) -> str:
    """A line per case and phase: the fused LEAF's time, and its ratio to each other's, below 1 where LEAF is faster."""
    others, lines = ("silu", "compile", "plain", "authors", "copy"), []
    for rows in results:
        fused = rows["fused"]
        times = (f"{t:.4g}" for t in (fused.median_ms, fused.p20_ms, fused.p80_ms))
        ratios = (f"{1 / rows[p].over_fused:.2f}" if p in rows else "" for p in others)
        lines.append([*fused.labels(), fused.phase + " !" * fused.crowded, *times, f"{fused.gb_per_s:.3g}", *ratios])
    headers = ["u", "parameters", "phase", "fused ms", "p20", "p80", "GB/s", *(f"fused/{p}" for p in others)]
    align = ["left"] * 3 + ["right"] * (len(headers) - 3)
    return tabulate(lines, headers, tablefmt=style, colalign=align, disable_numparse=True)


def is_crowded(results: list[dict[str, Row]]) -> bool:
    return any(rows["fused"].crowded for rows in results)


def save(args: argparse.Namespace, where: dict, results: list[dict[str, Row]]) -> None:
    flat = [dataclasses.asdict(row) for rows in results for row in rows.values()]
    if args.json:
        args.json.write_text(json.dumps({"machine": where, "rows": flat}, indent=1, default=str) + "\n")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(flat)
    if args.markdown:
        args.markdown.write_text(f"{table(results, 'github')}\n\n{below_table(where, is_crowded(results))}\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, rounds=11, least_rounds=2)
    parser.add_argument("--quick", action="store_true", help="a few cases, shorter samples")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only the cases whose name holds it")
    parser.add_argument("--sweep", action="store_true", help="2^10 to 2^26 elements instead of the cases")
    parser.add_argument(
        "--largest", type=int, default=26, metavar="K", choices=range(10, 31), help="the sweep ends at 2^K elements"
    )
    left_out = [p for p in FUNCTIONS if p not in ("fused", "silu")]
    parser.add_argument("--without", nargs="+", default=[], choices=left_out, help="providers to leave out")
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's malloc as it is")
    parser.add_argument("--csv", type=output_file, metavar="FILE", help="write the rows")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the rows and the machine")
    parser.add_argument("--plot", type=output_folder, metavar="FOLDER", help="write figures as PNG (needs matplotlib)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.plot:
        import plots  # noqa: F401  so that a missing matplotlib is reported before the run
    if args.device == "cpu" and not args.default_malloc:
        restart_with_malloc()
    if leaf_cuda.backend_for(torch.empty(0, device=args.device)) == "composite":
        sys.exit(f"this build of leaf_cuda has no fused kernel for {args.device}")
    every = sweep(1 << args.largest) if args.sweep else cases(args.device, args.quick)
    chosen = [case for case in every if args.only in str(case)]
    if not chosen:
        sys.exit("\n".join([f"no case holds {args.only!r}; the cases are", *map(str, every)]))

    for provider in args.without:
        del FUNCTIONS[provider]
    where, results = machine(args), []
    with tqdm(total=len(chosen) * len(TENSORS_MOVED) * args.rounds, unit="round", disable=None) as progress:
        for case in chosen:
            progress.set_description(str(case))
            results += run_case(dataclasses.replace(case, threads=case.threads or args.threads), args, progress)
            save(args, where, results)  # now, for a run may be cut short
    print(table(results, "simple"), below_table(where, is_crowded(results)), sep="\n\n")
    if args.plot:
        import plots

        plots.write([dataclasses.asdict(row) for rows in results for row in rows.values()], args.plot)


if __name__ == "__main__":
    main()
