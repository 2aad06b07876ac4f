"""Writes the result tables of README.md and docs/compatibility.md: those of the benchmark, from
benchmarks/results/<machine>/full.json (bench_leaf.py --json), and that of features, from tests/features/*.json (pytest
--features tests/features); and, beside each full.json, the figures made of it and of sweep*.json. It takes any number of
these files."""

import json
import re
import sys
from pathlib import Path

import plots
from bench_leaf import Case, below_table, cases
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
FEATURES = ROOT / "tests/features"


def read(path: Path, *keys: str) -> list:
    """What the JSON file has under the keys."""
    try:
        content = json.loads(path.read_text())
        return [content[key] for key in keys]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path} cannot be read ({type(error).__name__}: {error}); nothing was written")


def rows_of(case: Case, rows: list[dict]) -> dict[tuple[str, str], dict]:
    """(phase, provider) → its row."""
    fields = json.loads(json.dumps({**vars(case), "threads": None}, default=str))
    return {(row["phase"], row["provider"]): row for row in rows if {**row, **fields, "threads": row["threads"]} == row}


def section(device: str) -> str:
    """Of the machine measured last, a row for each quick case: fused LEAF's time, and its ratios to others'."""
    files = list(RESULTS.glob(f"{device}*/full.json"))
    if not files:
        return f"No results of a {device.upper()} run are in `benchmarks/results/` yet, so none are shown.\n"
    file = max(files, key=lambda file: read(file, "machine")[0]["date"])
    machine, rows = read(file, "machine", "rows")
    over = [("forward", "silu"), ("backward", "silu"), *(("both", p) for p in ("silu", "compile", "plain", "authors"))]
    lines = []
    for case in cases(device, quick=True):
        found = rows_of(case, rows)
        if ("both", "fused") not in found:  # a run may be cut short
            continue
        ratios = [f"{1 / found[key]['over_fused']:.2f}" if key in found else "" for key in over]
        lines.append([*case.labels(), f"{found['both', 'fused']['median_ms']:.3g}", *ratios])
    headers = ["u", "parameters", "LEAF, ms"]
    headers += ["/ silu, forward", "/ silu, backward", *(f"/ {p}" for p in ("silu", "compile", "plain", "authors"))]
    align = ["left"] * 2 + ["right"] * (len(headers) - 2)
    table = tabulate(lines, headers, tablefmt="github", colalign=align, disable_numparse=True)
    others = [f"[{f.parent.name}]({f.with_suffix('.md').relative_to(ROOT)})" for f in sorted(files)]
    where = f"By `python benchmarks/bench_leaf.py` on {below_table(machine)}"
    return f"{table}\n\n{where}\n\nAll cases of all machines: {', '.join(others)}.\n"


def cell(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "not run"
    wrong = counts["failed"] + counts["error"] + counts["xfailed"]
    passed = f"{counts['passed']} pass"
    return f"{passed}, {wrong} do not" if wrong else passed if counts["passed"] else "not run"


def features() -> str:
    """A row per feature, a column per torch; a cell counts the feature's tests."""
    if not any(FEATURES.glob("*.json")):
        return "No run is in `tests/features/` yet.\n"
    runs = [read(path, "features", "torch", "gpu") for path in sorted(FEATURES.glob("*.json"))]
    names = list(runs[-1][0])
    rows = [[name, *(cell(counts.get(name)) for counts, *_ in runs)] for name in names]
    headers = [f"torch {torch}{', GPU: ' + gpu if gpu else ', no GPU'}" for _, torch, gpu in runs]
    return tabulate(rows, ["tests of", *headers], tablefmt="github") + "\n"


def main() -> None:
    documents = [ROOT / "README.md", ROOT / "docs/compatibility.md"]
    pattern = r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)"

    def table(m: re.Match) -> str:
        return f"{m[1]}{features() if m[2] == 'features' else section(m[2])}{m[3]}"

    texts = [re.sub(pattern, table, document.read_text(), flags=re.DOTALL) for document in documents]
    rows = {}
    for folder in filter(Path.is_dir, RESULTS.iterdir()):
        paths = [*folder.glob("full.json"), *sorted(folder.glob("sweep*.json"))]
        rows[folder] = [row for path in paths for row in read(path, "rows")[0]]
    for folder, of_folder in rows.items():
        plots.write(of_folder, folder)
    for document, text in zip(documents, texts):
        document.write_text(text)


if __name__ == "__main__":
    main()
