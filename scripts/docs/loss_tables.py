"""The tables of docs/evidence/results.md that say what sets of streaming layers lose, from reports of `lt-gguf analyze`.

python scripts/docs/loss_tables.py REPORT.json... > tables.md
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lt_gguf.report.report import Report
from lt_gguf.selection.evidence import FIRST, LATER, TEXT, Candidate, Evidence
from lt_gguf.spec import format_layers
from lt_gguf.statistics import Estimate


def tables(report: Report) -> Iterable[str]:
    """What each measured set of one report loses: by where it is asked, by kind of question, and each layer alone."""
    n_layer = report.spec.n_layer
    by_size: list[Candidate] = []
    alone: list[Candidate] = []
    windows: list[Candidate] = []
    for candidate in report.selection.candidates:
        name, _, size = candidate.name.partition(", ")
        if name.startswith("window "):
            windows.append(candidate)
        elif name.startswith("layer "):
            alone.append(candidate)
        elif size:
            by_size.append(candidate)
    yield f"### {report.model}: {report.spec}\n\n{report.selection.reason}\n\n{report.selection.measurement}\n"
    yield _table(("set", "layers", *_WHERE, "lost", "found"), (_row(c, n_layer) for c in by_size))
    kinds = sorted({outcome.kind for candidate in by_size for outcome in candidate.evidence.answers})
    lengths = report.selection.candidates[-1].evidence.lengths
    yield _table(("set", *kinds), ((c.name, *(_lost(_of_kind(c.evidence, kind)) for kind in kinds)) for c in by_size))
    if len(lengths) > 1:
        yield _table(
            ("set", *(f"{n:,} tokens" for n in lengths)),
            ((c.name, *(_lost(c.evidence.of_length(n)) for n in lengths)) for c in by_size),
        )
    if windows:
        yield _table(("window, layers", "layers", *_WHERE, "lost", "found"), (_row(c, n_layer) for c in windows))
    ratios = report.mean_ratios
    ratio: Callable[[int], str] = lambda il: "-" if ratios is None or math.isnan(ratios[il]) else f"{ratios[il]:.3f}"  # noqa: E731
    worst = sorted(alone, key=lambda c: -c.evidence.kl)[:8]
    yield _table(
        ("layer alone", "lazy ratio", "KL", "lost"),
        ((c.name, ratio(c.layers[0]), _number(c.evidence.kl), _lost(c.evidence)) for c in worst),
    )


_WHERE = tuple(f"KL, {where}" for where in (TEXT, FIRST, LATER))


def _row(candidate: Candidate, n_layer: int) -> tuple[str, ...]:
    evidence = candidate.evidence
    layers = "all" if len(candidate.layers) == n_layer else format_layers(candidate.layers) or "none"
    kl = (_interval(evidence.kl_where(where)) for where in (TEXT, FIRST, LATER))
    return candidate.name, layers, *kl, _lost(evidence), f"{evidence.accuracy:.0%}"


def _of_kind(evidence: Evidence, kind: str) -> Evidence:
    return Evidence(tuple(outcome for outcome in evidence.outcomes if outcome.kind == kind))


def _lost(evidence: Evidence) -> str:
    low, value, high = (evidence.loss.low, evidence.loss.value, evidence.loss.high)
    return "-" if math.isnan(value) else f"{value:.1%} ({low:.1%} to {high:.1%})".replace("%", " %")


def _interval(estimate: Estimate) -> str:
    return f"{_number(estimate.value)} ({_number(estimate.low)} to {_number(estimate.high)})"


def _number(value: float) -> str:
    return f"{value:.2g}" if value >= 0.0001 or value == 0 else f"{value:.1g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join(['---', *['--:'] * (len(header) - 1)])} |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print("\n".join(tables(Report.read(Path(path)))))
