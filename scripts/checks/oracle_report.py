"""Runs the logits oracle and prints its largest differences as Markdown tables.

    python scripts/checks/oracle_report.py [--full] [--measurements FILE]

--full runs the whole matrix (seven minutes on one core); --measurements takes a file that `pytest tests/oracle
--measurements FILE` has written instead of running anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def measure(file: Path, full: bool) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/oracle", "--measurements", file]
    if subprocess.run(command + ["--full"] * full, cwd=ROOT, stdout=sys.stderr).returncode:
        sys.exit("oracle_report: error: tests failed, their output is above")


def tables(rows: list[dict]) -> str:
    """The rows that the oracle's tests recorded: exact settings and lazy ratios by largest difference, the others beside the full model."""
    ratios = [row for row in rows if row["setting"].startswith("lazy ratio")]
    exact = [row for row in rows if "full" not in row and row not in ratios]
    relative = [row for row in rows if "full" in row]
    parts = []
    if exact:
        largest = max(exact, key=lambda row: row["difference"])
        parts.append(
            f"Logits, f32 KV, no flash attention: largest absolute difference (the bound is {largest['bound']:.0e}; "
            f"largest of all {largest['difference']:.1e}, {largest['family']}, {largest['setting']})\n\n"
            + matrix(exact, largest_difference)
        )
    if relative:
        ratio = max(relative, key=lambda row: row["difference"] / row["full"])
        parts.append(
            "Logits elsewhere: hybrid (full model's own error), the largest of each; the bound is 2.5 times the full model's, "
            f"largest of all {ratio['difference'] / ratio['full']:.2f} times ({ratio['family']}, {ratio['setting']})\n\n"
            + matrix(relative, lambda found: f"{largest_difference(found)} ({max(row['full'] for row in found):.1e})")
        )
    if ratios:
        parts.append("Lazy ratios: largest absolute difference to plain softmax\n\n" + matrix(ratios, largest_difference))
    parts.append(f"{len(rows)} measurements.")
    return "\n\n".join(parts)


def largest_difference(rows: list[dict]) -> str:
    return f"{max(row['difference'] for row in rows):.1e}"


def matrix(rows: list[dict], cell: Callable[[list[dict]], str]) -> str:
    """A Markdown table of what `cell` says of the rows of each setting and family."""
    families = sorted({row["family"] for row in rows})
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    found = defaultdict(list)
    for row in rows:
        found[row["setting"], row["family"]].append(row)
    lines = [f"| | {' | '.join(families)} |", f"| --- |{' --- |' * len(families)}"]
    for setting in settings:
        cells = (cell(found[setting, family]) if (setting, family) in found else "" for family in families)
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the whole matrix")
    parser.add_argument("--measurements", type=Path, help="a file of measurements, instead of a run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        file = options.measurements or Path(directory) / "measurements.jsonl"
        if not options.measurements:
            measure(file, options.full)
        try:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
        except (OSError, ValueError) as error:
            sys.exit(f"oracle_report: error: {file} is no file of measurements: {error}")
    if not rows:
        sys.exit(f"oracle_report: error: {file} holds no measurements")
    print(tables(rows))


if __name__ == "__main__":
    main()
