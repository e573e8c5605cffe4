"""Types of the KV cache in a report: a table, and the picture of what is lost over memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from lt_gguf.memory.sizes import format_bytes
from lt_gguf.report.plots import STREAMING_COLOUR, new_figure
from lt_gguf.report.report import Report
from lt_gguf.selection.base import LONGEST_COMPARED
from lt_gguf.selection.caches import CachePoint, Caches
from lt_gguf.spec.cache_types import PLAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMALL = 0.01  # loss up to which the axis is linear
_LEAST = -0.03  # what is below is shown there
_LOSSES = (_LEAST, 0, 0.01, 0.03, 0.1, 0.3, 1)
_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class CacheRow(NamedTuple):
    """What a table says of one way to hold the cache."""

    cache: str
    streaming: str
    memory: str
    share: str
    kl: str
    lost: str
    note: str


HEADS = CacheRow("cache", "streaming", "KV cache", "of f16", "KL", "lost", "")


def cache_rows(report: Report, caches: Caches) -> list[CacheRow]:
    """A row for the full model and one for the chosen layers with each type."""
    plain = _plain_bytes(caches)
    return [
        CacheRow(
            str(point.types),
            f"{len(point.layers)} of {report.spec.n_layer}",
            format_bytes(point.n_bytes),
            f"{point.n_bytes / plain:.0%}",
            f"{point.evidence.kl:.4f}",
            _lost(point),
            _note(report, caches, point),
        )
        for point in caches.points
        if point.layers in ((), report.spec.layers)
    ]


def _lost(point: CachePoint) -> str:
    if point.types == PLAIN and not point.layers:
        return "0%"  # it is what all are compared with
    loss = point.evidence.loss
    return "-" if math.isnan(loss.value) else f"{loss.value:.1%} ({100 * loss.low:.1f} to {100 * loss.high:.1f})"


def _note(report: Report, caches: Caches, point: CachePoint) -> str:
    if point.layers == report.spec.layers and point.types == caches.recommended:
        return "recommended"
    return "breaks it" if not point.layers and point.types in caches.breaking else ""


def loss_over_memory(report: Report, caches: Caches) -> Figure:
    """What is lost over the bytes of the KV cache: streaming alone, quantizing alone, and both, with 95 % intervals."""
    length = f"{LONGEST_COMPARED:,} tokens"
    figure, axes = new_figure(f"What {report.model} loses for a smaller KV cache", f"at {length}; layers that stream keep 16 bits")
    groups = (
        ("streaming alone", [point for point in caches.points if point.types == PLAIN], "o-", STREAMING_COLOUR),
        ("quantizing alone", [point for point in caches.points if point.types != PLAIN and not point.layers], "s", "#D55E00"),
        ("both", [point for point in caches.points if point.types != PLAIN and point.layers], "D", "#009E73"),
    )
    plain = _plain_bytes(caches)
    for name, points, style, colour in groups:
        if points:
            _draw(axes, name, sorted(points, key=lambda point: point.n_bytes), plain, style, colour)
    chosen = next(point for point in caches.points if point.layers == report.spec.layers and point.types == caches.recommended)
    at = (chosen.n_bytes / plain, _on_axis(chosen.evidence.loss.value))
    axes.plot(*at, "o", markersize=13, markerfacecolor="none", markeredgecolor="#444444", label="recommended")
    axes.set_yscale("symlog", linthresh=_SMALL, linscale=0.6)
    axes.set_ylim(1.2 * _LEAST, 1.3)
    axes.set_yticks(_LOSSES, [f"{loss:.0%}" for loss in _LOSSES])
    axes.set_xscale("log")
    shares = [share for share in _SHARES if share > 0.4 * min(point.n_bytes for point in caches.points) / plain]
    axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axes.set_xlim(shares[0], 1.2)
    axes.minorticks_off()
    axes.set_xlabel(f"KV cache at {length}, of the full model's in f16")
    axes.set_ylabel("lost of what the full model finds")
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    return figure


def _draw(axes: Axes, name: str, points: list[CachePoint], plain: int, style: str, colour: str) -> None:
    shares = [point.n_bytes / plain for point in points]
    losses = [point.evidence.loss for point in points]
    values, low, high = ([_on_axis(getattr(loss, end)) for loss in losses] for end in ("value", "low", "high"))
    axes.plot(shares, values, style, color=colour, markersize=5, label=name)
    axes.vlines(shares, low, high, color=colour, alpha=0.35, linewidth=2)
    for share, value, point in zip(shares, values, points):
        if point.types != PLAIN:
            label: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "rotation": 35, "color": colour}
            axes.annotate(str(point.types), (share, value), (3, 4), **label)


def _on_axis(loss: float) -> float:
    return max(_LEAST, min(1.0, loss))


def _plain_bytes(caches: Caches) -> int:
    return next(point.n_bytes for point in caches.points if point.types == PLAIN and not point.layers)
