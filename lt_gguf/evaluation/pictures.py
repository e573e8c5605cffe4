"""Pictures of an evaluation: a heat map of scores by depth and length, and bars with confidence intervals.

In the style of `lt_gguf.report.plots`, whose `save` writes them: nobody has to tell two colours apart, numbers or hatching say the
same. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lt_gguf.report.plots import FULL_COLOUR, STREAMING_COLOUR
from lt_gguf.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

_COLOUR_MAP = "cividis"  # made to look the same to colour-blind readers
# Of Okabe and Ito's palette, then hatchings: 5 and 7, so that 35 bars of a group differ.
_COLOURS = (STREAMING_COLOUR, "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_HATCHES = ("///", "", "...", "xxx", "\\\\\\", "---", "ooo")
_NOT_MEASURED: dict[str, Any] = {"facecolor": "none", "edgecolor": "#BBBBBB", "hatch": "xxx", "linewidth": 0}
_GREY = "#444444"
_MAX_WIDTH = 16.0  # inches, as all sizes here
_MIN_WIDTH = 5.0
_MAX_PANELS = 3  # side by side
_CELL = (0.55, 0.42)  # width and height of a heat map's field
_NUMBER_WIDTH = 0.36  # that a number of three digits and a point takes
_BAR_WIDTHS = {True: 0.36, False: 0.5}  # that its number takes, a percentage and another one
_LETTER = 0.08  # width of one in names
_LEGEND_COLUMNS = 3


def heat_map(
    scores: Mapping[str, ArrayLike], lengths: Sequence[int], depths: Sequence[float], title: str, subtitle: str = ""
) -> Figure:
    """Scores by length of the prompt (across) and depth of the needle in it (down, from its beginning).

    Args:
        scores: by name of what was measured, a panel each: (depths, lengths), from 0 to 1, NaN where none was measured.
        lengths: of the prompts, in tokens.
        depths: from 0, at the beginning of the text, to 1.
        title: of the picture.
        subtitle: what the scores were measured with.

    Raises:
        ValueError: scores of another shape, or none.
    """
    import numpy as np

    if not scores:
        raise ValueError("scores: are none, must be at least one panel")
    panels = {name: np.asarray(panel, dtype=np.float64) for name, panel in scores.items()}
    for name, panel in panels.items():
        if panel.shape != (len(depths), len(lengths)):
            raise ValueError(f"scores of {name}: have the shape {panel.shape}, must be {len(depths), len(lengths)}")
    n_down = math.ceil(len(panels) / _MAX_PANELS)
    n_across = math.ceil(len(panels) / n_down)
    cell = min(_CELL[0], (_MAX_WIDTH - 2) / (n_across * len(lengths)))
    panel_width = max(2.0, cell * len(lengths))
    figure = _figure(n_across * (panel_width + 0.3) + 1.8, n_down * (_CELL[1] * len(depths) + 1) + 1, title, subtitle)
    grid = figure.subplots(n_down, n_across, sharex=True, sharey=True, squeeze=False)
    shown, left_over = np.split(grid.ravel(), [len(panels)])
    for axes in left_over:
        axes.remove()
    for i, (axes, name) in enumerate(zip(shown, panels, strict=True)):
        fields = _draw_panel(axes, panels[name], numbers=cell >= _NUMBER_WIDTH)
        axes.set_title(textwrap.fill(_plain(name), int(panel_width / _LETTER)), fontsize=10)
        is_lowest = i + n_across >= len(panels)
        axes.tick_params(length=0, labelbottom=is_lowest)
        axes.tick_params(axis="x", rotation=45)
        axes.set_xlabel("prompt, tokens" if is_lowest else "")
        axes.set_ylabel("" if i % n_across else "depth of the needle")
    axes = grid[0, 0]  # with which the others share theirs
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.3g} %" for depth in depths])
    axes.set_ylim(len(depths) - 0.5, -0.5)
    figure.colorbar(fields, ax=shown, label="score", format=_percent(), pad=0.02)
    if any(np.isnan(panel).any() for panel in panels.values()):
        _legend(figure, {"not measured": _NOT_MEASURED})
    return figure


def bars(
    estimates: Mapping[str, Mapping[str, Estimate]],
    title: str,
    subtitle: str = "",
    label: str = "score",
    percent: bool = True,
    full: str = "full",
) -> Figure:
    """A group of bars for each task, with a bar and its interval for each of what is compared.

    Args:
        estimates: by name of what is compared, then by task. A task that one of them hasn't is marked as not measured.
            Where an interval has no end, none is drawn.
        title: of the picture.
        subtitle: what was measured, and how sure the intervals are.
        label: of the axis.
        percent: the values are shares of 1, and shown from 0 to 100 %.
        full: name of the full model, which is in grey.

    Raises:
        ValueError: nothing to draw.
    """
    tasks = list(dict.fromkeys(task for by_task in estimates.values() for task in by_task))
    if not tasks:
        raise ValueError("estimates: are none, must be at least one of one task")
    n = len(estimates)
    width = len(tasks) * max(1.2, (n + 1) * _BAR_WIDTHS[percent]) + 1
    figure = _figure(width, 4.2, title, subtitle)
    styles = _bar_styles(estimates, full)
    _legend(figure, styles)
    axes = figure.add_subplot()
    step = 0.84 / n  # of 1 between tasks, the rest is the gap
    for i, (name, by_task) in enumerate(estimates.items()):
        for position, task in enumerate(tasks):
            x = position + (i - (n - 1) / 2) * step
            if task in by_task:
                _draw_bar(axes, x, by_task[task], step, styles[name], percent, numbers=width <= _MAX_WIDTH)
            else:
                axes.text(x, 0, " not measured", rotation="vertical", ha="center", va="bottom", fontsize=7, color=_GREY)
    axes.set_xticks(range(len(tasks)), list(map(_plain, tasks)))
    axes.set_xlim(-0.6, len(tasks) - 0.4)
    axes.set_ylabel(label)
    axes.margins(y=0.1)
    if percent:
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        axes.yaxis.set_major_formatter(_percent())
        axes.set_ylim(0, 1.1)  # room for the numbers
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _draw_panel(axes: Axes, scores: Any, numbers: bool) -> Any:
    """Fields and, if they have room, their numbers. Returns what a colour bar is made of."""
    import numpy as np

    n_depths, n_lengths = scores.shape
    edges = np.arange(n_lengths + 1) - 0.5, np.arange(n_depths + 1) - 0.5
    axes.fill_between(edges[0][[0, -1]], *edges[1][[0, -1]], **_NOT_MEASURED)
    # note: from 0 to 1 everywhere, so that pictures can be compared
    fields = axes.pcolormesh(*edges, scores, cmap=_COLOUR_MAP, vmin=0, vmax=1, edgecolors="white")
    if numbers:
        for depth, length in np.argwhere(~np.isnan(scores)):
            score = scores[depth, length]
            colour = "black" if score > 0.5 else "white"
            axes.text(length, depth, _number(score, percent=True), ha="center", va="center", fontsize=8, color=colour)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return fields


def _draw_bar(axes: Axes, x: float, estimate: Estimate, width: float, style: dict[str, Any], percent: bool, numbers: bool) -> None:
    axes.bar(x, estimate.value, width=width, **style)
    top = estimate.value
    if math.isfinite(estimate.low) and math.isfinite(estimate.high):  # else too few samples to say
        ends = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
        axes.errorbar(x, estimate.value, yerr=ends, fmt="none", ecolor="black", elinewidth=1, capsize=2.5)
        top = estimate.high
    if numbers:
        place: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(_number(estimate.value, percent), (x, max(0.0, top)), fontsize=7, color=_GREY, **place)


def _figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """Nobody's current figure, so nothing is kept after it and no screen is needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(_MAX_WIDTH, max(_MIN_WIDTH, width)), height), layout="constrained")
    figure.suptitle(_plain(title) + (f"\n{_plain(subtitle)}" if subtitle else ""), fontsize=11)
    return figure


def _legend(figure: Figure, styles: Mapping[str, dict[str, Any]]) -> None:
    """Below the picture, which grows by it."""
    from matplotlib.patches import Patch

    handles = [Patch(label=_plain(name), **style) for name, style in styles.items()]
    room = figure.get_figwidth() / (_LETTER * max(map(len, styles)) + 0.7)
    n_columns = max(1, min(int(room), _LEGEND_COLUMNS, len(handles)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(handles) / n_columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=n_columns, frameon=False, fontsize=9)


def _bar_styles(names: Iterable[str], full: str) -> dict[str, dict[str, Any]]:
    colours = zip(itertools.cycle(_COLOURS), itertools.cycle(_HATCHES))
    styles = {}
    for name in names:
        if name == full:
            styles[name] = {"facecolor": FULL_COLOUR, "edgecolor": "#888888", "linewidth": 0.6}
        else:
            colour, hatch = next(colours)
            styles[name] = {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.6}
    return styles


def _number(value: float, percent: bool) -> str:
    """Short: a bar and a field are narrow."""
    if percent:
        return f"{100 * value:.1f}".removesuffix(".0")
    return f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, symbol=" %")


def _plain(text: str) -> str:
    """note: $ would begin a formula"""
    return text.replace("$", r"\$")
