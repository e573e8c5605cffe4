"""Runs the logits oracle and prints its largest differences as Markdown tables.

    python scripts/oracle_report.py [--full] [--measurements FILE]

--full runs the whole matrix (half an hour on 2 cores); --measurements takes a file that `pytest tests/oracle
--measurements FILE` has written instead of running anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measure(file: Path, full: bool) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/oracle", "--measurements", file]
    if subprocess.run(command + ["--full"] * full, cwd=ROOT, stdout=sys.stderr).returncode:
        sys.exit("oracle_report: error: tests failed, their output is above")


def tables(rows: list[dict]) -> str:
    """The rows that the oracle's tests recorded: exact settings by largest difference, the others beside the full model."""
    exact = [row for row in rows if "full" not in row]
    relative = [row for row in rows if "full" in row]
    families = sorted({row["family"] for row in rows})
    largest = max(exact, key=lambda row: row["difference"])
    parts = [
        f"f32 KV, no flash attention: largest absolute difference of a logit (the bound is {largest['bound']:.0e}; "
        f"largest of all {largest['difference']:.1e}, {largest['family']}, {largest['setting']})\n",
        matrix(exact, families, lambda found: f"{max(row['difference'] for row in found):.1e}"),
        "\nElsewhere: hybrid (full model's own error), the largest of each; the bound is 2.5 times the full model's\n",
        matrix(
            relative,
            families,
            lambda found: f"{max(row['difference'] for row in found):.1e} ({max(row['full'] for row in found):.1e})",
        ),
    ]
    ratio = max(relative, key=lambda row: row["difference"] / row["full"])
    parts.append(
        f"\nLargest ratio to the full model's error under the same settings: {ratio['difference'] / ratio['full']:.2f} "
        f"({ratio['family']}, {ratio['setting']}); {len(rows)} measurements."
    )
    return "\n".join(parts)


def matrix(rows: list[dict], families: list[str], cell) -> str:
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    found = defaultdict(list)
    for row in rows:
        found[row["setting"], row["family"]].append(row)
    used = [family for family in families if any((setting, family) in found for setting in settings)]
    lines = [f"| | {' | '.join(used)} |", f"| --- |{' --- |' * len(used)}"]
    for setting in settings:
        cells = (cell(found[setting, family]) if (setting, family) in found else "" for family in used)
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
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    if not rows:
        sys.exit(f"oracle_report: error: {file} holds no measurements")
    print(tables(rows))


if __name__ == "__main__":
    main()
