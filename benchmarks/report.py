"""Writes the README's tables: the benchmark's, from benchmarks/results/<device>/table.md (bench_leaf.py --markdown), and
that of features, from tests/features/*.json (pytest --features tests/features); and the figures, from full.json and
sweep*.json, one run or more, beside the table (bench_leaf.py --json)."""

import json
import re
from pathlib import Path

import plots
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
FEATURES = ROOT / "tests/features"


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
    runs = [json.loads(path.read_text()) for path in sorted(FEATURES.glob("*.json"))]
    names = list(runs[-1]["features"])
    rows = [[name, *(cell(run["features"].get(name)) for run in runs)] for name in names]
    headers = [f"torch {run['torch']}{', GPU: ' + run['gpu'] if run['gpu'] else ', no GPU'}" for run in runs]
    return tabulate(rows, ["tests of", *headers], tablefmt="github") + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    pattern = r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)"

    def table(m: re.Match) -> str:
        return f"{m[1]}{features() if m[2] == 'features' else section(m[2])}{m[3]}"

    text = re.sub(pattern, table, readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)
    for folder in RESULTS.iterdir():
        paths = [*folder.glob("full.json"), *sorted(folder.glob("sweep*.json"))]
        plots.write([row for path in paths for row in json.loads(path.read_text())["rows"]], folder)


if __name__ == "__main__":
    main()
