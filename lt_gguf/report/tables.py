"""What a terminal shows of a selection: a bar for each layer's lazy ratio, and the candidates that were run."""

from __future__ import annotations

import math
import sys

from rich.console import Console
from rich.table import Table

from lt_gguf.report.caches import HEADS, cache_rows
from lt_gguf.report.model_card import number
from lt_gguf.report.report import Report
from lt_gguf.selection import Selection
from lt_gguf.selection.base import LONGEST_COMPARED
from lt_gguf.selection.evidence import WHERE
from lt_gguf.selection.preset import Preset
from lt_gguf.selection.trained import Trained
from lt_gguf.spec import StreamingSpec, format_layers

BAR_WIDTH = 40
NOT_MEASURED = "note: what is lost with these layers wasn't measured: lt-gguf eval does it, or --select loss"


def print_bars(report: Report) -> None:
    """Prints a bar for each layer of a report that has ratios; the streaming ones are marked."""
    assert report.mean_ratios is not None
    console = Console(highlight=False)
    table = Table("layer", "lazy ratio", "", "", box=None)
    table.columns[0].justify = table.columns[1].justify = "right"
    for il, ratio in enumerate(report.mean_ratios):
        streams = report.spec.is_streaming(il)
        bar = "" if math.isnan(ratio) else f"{'█' * round(ratio * BAR_WIDTH):░<{BAR_WIDTH}}"
        value = "-" if math.isnan(ratio) else f"{ratio:.4f}"
        table.add_row(str(il), value, bar, "streams" if streams else "", style="green" if streams else None)
    console.print(table)
    for line in (
        f"{report.selection.strategy}: {report.selection.reason}",
        f"measured with {report.conditions}",
        f'--streaming "{report.spec}"',
    ):
        console.print(line, soft_wrap=True, markup=False)


def print_candidates(selection: Selection, spec: StreamingSpec) -> None:
    """Prints what was measured on the hybrid itself when its layers were chosen, if anything was; `spec` is what streams."""
    if not selection.candidates:
        return
    console = Console(highlight=False)
    table = Table("candidate", "streaming layers", *(f"KL, {where}" for where in WHERE), "lost", "found", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for candidate in selection.candidates:
        evidence = candidate.evidence
        kl = (number(evidence.kl_where(where).value) for where in WHERE)
        lost = "-" if math.isnan(evidence.loss.value) else f"{evidence.loss.value:.1%}"
        numbers = *kl, lost, f"{evidence.accuracy:.1%}"
        streams = bool(candidate.layers) and set(candidate.layers) <= set(spec.layers)
        table.add_row(candidate.name, format_layers(candidate.layers) or "none", *numbers, style="green" if streams else None)
    console.print(table)
    if selection.measurement is not None:
        console.print(f"measured on {selection.measurement}", soft_wrap=True, markup=False)


def print_caches(report: Report) -> None:
    """Prints what types of the KV cache cost with the chosen layers and without, if that was measured."""
    if report.caches is None:
        return
    console = Console(highlight=False)
    heads, *rows = (
        (row.cache, row.streaming, row.memory, row.kl, row.lost, row.note) for row in (HEADS, *cache_rows(report, report.caches))
    )
    table = Table(*heads, box=None)
    for column in table.columns[2:-1]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row, style="green" if row[-1] == "recommended" else None)
    console.print(table)
    console.print(f"KV cache of {LONGEST_COMPARED:,} tokens; layers that stream keep 16 bits", soft_wrap=True, markup=False)


def print_warning(selection: Selection) -> None:
    """Says on stderr what is lost, where that is more than is tolerated, or that nobody knows it."""
    is_trained = selection.strategy == Trained.name or selection.strategy.startswith(Preset.name)
    if selection.warning is not None:
        print(f"warning: {selection.warning}", file=sys.stderr)
    elif selection.layers and not is_trained and all(each.layers != selection.layers for each in selection.candidates):
        print(NOT_MEASURED, file=sys.stderr)
