"""Pictures of a benchmark: speed and memory over the context, a line for each contender.

In the style of `lt_gguf.report.plots`, whose `save` writes them: lines differ in colour, mark and dash, so that nobody has to tell two
colours apart. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lt_gguf.bench.contender import DECODE, PROMPT, THROUGHPUT, Contender
from lt_gguf.bench.results import FIRST, SPEED, Results
from lt_gguf.report.plots import STREAMING_COLOUR, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette as far as it goes; ours are whole lines with filled marks, peers in the others, dashed.
_OURS = (STREAMING_COLOUR, "#009E73", "#000000", "#56B4E9", "#5E3C99", "#66A61E")
_PEERS = ("#D55E00", "#E69F00", "#CC79A7", "#7F7F7F", "#8C6D31", "#A50F15")
_MARKS = "osD^vP"
_PEER_MARKS = "xX+1234"
_MIB = 1 << 20


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Names and pictures of what was measured. Raises ImportError without matplotlib."""
    name = results.model.path.name
    subtitle = f"{results.machine}; {results.plan}, medians"
    wanted = [
        ("speed", DECODE, SPEED, f"Decoding with {name}", "tokens a second"),
        ("first_token", PROMPT, FIRST, f"Time to the first token, {name}", "seconds"),
        ("throughput", THROUGHPUT, SPEED, f"Throughput of {name}", "tokens a second, all sequences"),
    ]
    for stem, task, key, title, label in wanted:
        if results.depths(task):
            yield stem, _lines(results, task, key, title, subtitle, label)
    if depths := results.depths(DECODE):
        yield "memory", _memory(results, depths, f"KV cache of {name}")


def _memory(results: Results, depths: list[int], title: str) -> Figure:
    figure, axes = new_figure(title, "of contexts of so many tokens", 8.0, 4.8)
    for contender, style in _styles(results):
        sizes = [contender.context_bytes(results.model, depth) / _MIB for depth in depths]
        if any(sizes):
            axes.plot(depths, sizes, label=contender.name, **style)
    _finish(figure, axes, depths, "MiB")
    return figure


def _lines(results: Results, task: str, key: str, title: str, subtitle: str, label: str) -> Figure:
    figure, axes = new_figure(title, subtitle, 8.0, 4.8)
    for contender, style in _styles(results):
        points = [(depth, spread) for depth in results.depths(task) if (spread := results.value(contender, task, depth, key))]
        if not points:
            continue
        depths = [depth for depth, _ in points]
        medians, lows, highs = zip(*(spread for _, spread in points))
        axes.plot(depths, medians, label=contender.name, **style)
        axes.fill_between(depths, lows, highs, color=style["color"], alpha=0.12, linewidth=0)
    _finish(figure, axes, results.depths(task), label)
    return figure


def _finish(figure: Figure, axes: Axes, depths: list[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [f"{depth:,}" for depth in depths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)


def _styles(results: Results) -> Iterator[tuple[Contender, dict[str, Any]]]:
    """A look of its own for each contender."""
    ours = zip(itertools.cycle(_OURS), itertools.cycle(_MARKS))
    peers = zip(itertools.cycle(_PEERS), itertools.cycle(_PEER_MARKS))
    for contender in results.contenders:
        colour, mark = next(peers if contender.is_peer else ours)
        dash = "--" if contender.is_peer else "-"
        yield (
            contender,
            {"color": colour, "marker": mark, "linestyle": dash, "linewidth": 1.6, "markersize": 8 if contender.is_peer else 5},
        )
