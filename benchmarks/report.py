"""Writes the README's tables: the benchmark's, from benchmarks/results/<device>/table.md (bench_leaf.py --markdown), and
that of features, from tests/features/*.json (pytest --features tests/features); and the figures, from full.json and
sweep*.json, one run or more, beside the table (bench_leaf.py --json)."""

import json
import re
import sys
from pathlib import Path

import plots
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


def section(name: str) -> str:
    tables = sorted(RESULTS.glob(f"{name}*/table.md"))
    if not tables:
        return f"No results of a {name.upper()} run are in `benchmarks/results/` yet, so none are shown.\n"
    return "\n".join(table.read_text() for table in tables)


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
    readme = ROOT / "README.md"
    pattern = r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)"

    def table(m: re.Match) -> str:
        return f"{m[1]}{features() if m[2] == 'features' else section(m[2])}{m[3]}"

    text = re.sub(pattern, table, readme.read_text(), flags=re.DOTALL)
    rows = {}
    for folder in filter(Path.is_dir, RESULTS.iterdir()):
        paths = [*folder.glob("full.json"), *sorted(folder.glob("sweep*.json"))]
        rows[folder] = [row for path in paths for row in read(path, "rows")[0]]
    for folder, of_folder in rows.items():
        plots.write(of_folder, folder)
    readme.write_text(text)


if __name__ == "__main__":
    main()
