"""Figures of a benchmark's rows: the ratio to SiLU by case, and, of a sweep, time and bandwidth by size.

python benchmarks/plots.py full.json folder
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PHASES = ("forward", "backward", "both")


def name(row: dict) -> str:
    def tensor(shape: str, dtype: str) -> str:
        return f"{'x'.join(map(str, row[shape]))} {row[dtype].removeprefix('torch.')}"

    layout = "" if row["layout"] == "torch.contiguous_format" else " " + row["layout"].removeprefix("torch.")
    return f"{tensor('shape', 'dtype')}{layout}, parameters {tensor('parameter_shape', 'parameter_dtype')}"


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def ratios(rows: list[dict], path: Path) -> None:
    """For each case and phase, a bar of fused LEAF's time over SiLU's; longer than 1 is slower than SiLU."""
    fused = [row for row in rows if row["provider"] == "fused"]
    labels = list(dict.fromkeys(map(name, fused)))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.6 * len(labels)))
    for k, phase in enumerate(PHASES):
        of_phase = {name(row): row["over_silu"] for row in fused if row["phase"] == phase}
        axes.barh([i + 0.25 * k for i in range(len(labels))], [of_phase[n] for n in labels], 0.25, label=phase)
    axes.set_yticks([i + 0.25 for i in range(len(labels))], labels)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(1, color="black")
    axes.set_xlabel("time of fused LEAF / time of nn.SiLU")
    axes.legend()
    save(figure, path)


def sizes(rows: list[dict], path: Path) -> None:
    """For a sweep: nanoseconds per element, GB/s, and the ratio to SiLU, forward and backward together."""
    both = [row for row in rows if row["phase"] == "both"]
    copies = {math.prod(r["shape"]): r["gb_per_s"] for r in rows if r["provider"] == "copy" and r["phase"] == "forward"}
    granularities = list(dict.fromkeys(math.prod(row["parameter_shape"]) for row in both))
    figure, grid = plt.subplots(len(granularities), 3, figsize=(15, 4.5 * len(granularities)), squeeze=False)
    for line, count in zip(grid, granularities):
        series = defaultdict(list)
        for row in both:
            if math.prod(row["parameter_shape"]) == count:
                series[row["provider"]].append((math.prod(row["shape"]), row))
        for provider, points in series.items():
            n = [size for size, _ in points]
            line[0].loglog(n, [row["median_ms"] * 1e6 / size for size, row in points], marker=".", label=provider)
            line[1].semilogx(n, [row["gb_per_s"] for _, row in points], marker=".", label=provider)
            line[2].semilogx(n, [row["over_silu"] for _, row in points], marker=".", label=provider)
        copy = line[1].semilogx(*zip(*sorted(copies.items())), "k--", label="copy (forward)")
        line[1].legend(handles=copy)
        for axes, title in zip(line, ("ns per element", "GB/s, fewest bytes", "time / time of nn.SiLU")):
            axes.set(title=f"{title}; {count} parameters" if count > 1 else f"{title}; per layer", xlabel="elements")
            axes.grid(alpha=0.3)
        line[2].set_yscale("log")
        line[0].legend()
    save(figure, path)


def write(rows: list[dict], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{**row, **{key: str(row[key]) for key in ("dtype", "parameter_dtype", "layout")}} for row in rows]
    swept = [row for row in rows if row["case"] == "sweep"]
    if swept:
        sizes(swept, folder / "sizes.png")
    if rest := [row for row in rows if row["case"] != "sweep"]:
        ratios(rest, folder / "ratios.png")


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text())["rows"], Path(sys.argv[2]))
