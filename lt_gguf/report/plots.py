"""Pictures of lazy ratios: a bar for each layer, and a heat map of layers and samples.

Streaming layers differ in colour and in hatching or a mark, so that nobody has to tell two colours apart. matplotlib is
imported when a picture is drawn; nothing else in the package needs it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette, which colour-blind readers can tell apart; the grey is much lighter in print too.
STREAMING_COLOUR = "#0072B2"
FULL_COLOUR = "#D9D9D9"
_COLOUR_MAP = "cividis"  # made to look the same to colour-blind readers
_DPI = 150
_HEIGHT = 3.6  # inches
_ALL_TICKS = 24  # layers up to which each has a number
# Without a fixed salt and date an SVG would differ from run to run.
_SVG_SALT = "lt-gguf"


def check() -> None:
    """Raises ImportError, one line, if no picture can be drawn: before hours of measuring, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'lt-gguf[plot]'") from None


def lazy_ratio_bars(ratios: Sequence[float], layers: Collection[int], title: str, subtitle: str = "") -> Figure:
    """A bar for each layer's lazy ratio.

    Args:
        ratios: one number in [0, 1] a layer, NaN where none was measured.
        layers: the ones that stream, marked by colour and hatching.
        title: of the picture.
        subtitle: what the ratios were measured with.
    """
    from matplotlib.patches import Patch

    figure, axes = layer_figure(len(ratios), title, subtitle)
    for il, ratio in enumerate(ratios):
        if math.isnan(ratio):
            axes.text(il, 0.02, "not measured", rotation="vertical", ha="center", va="bottom", fontsize=7, color="#555555")
        else:
            axes.bar(il, ratio, width=0.8, **_style(il in layers))
    axes.set_ylim(0, 1)
    axes.set_ylabel("lazy ratio")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    kinds = [(True, f"streams ({len(layers)})"), (False, f"full attention ({len(ratios) - len(layers)})")]
    figure.legend(
        handles=[Patch(label=label, **_style(streams)) for streams, label in kinds],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    return figure


def ratio_heat_map(ratios_by_sample: Sequence[Sequence[float]], layers: Collection[int], title: str, subtitle: str = "") -> Figure:
    """A field for each layer (across) and sample (down), brighter where the layer is lazier.

    Args:
        ratios_by_sample: (samples, layers), NaN where none was measured: hatched.
        layers: the ones that stream, marked by a triangle above their column.
        title: of the picture.
        subtitle: what the ratios were measured with.
    """
    import numpy as np
    from matplotlib.patches import Patch

    ratios = np.ma.masked_invalid(np.asarray(ratios_by_sample, dtype=np.float64))
    n_samples, n_layer = ratios.shape
    figure, axes = layer_figure(n_layer, title, subtitle)
    axes.set_facecolor("white")
    not_measured: dict[str, Any] = {"facecolor": "none", "edgecolor": "#BBBBBB", "hatch": "xxx", "linewidth": 0}
    axes.fill_between([-0.5, n_layer - 0.5], -0.5, n_samples - 0.5, **not_measured)
    # note: the colours span what was measured; from 0 to 1 most models would be of one colour
    edges = np.arange(n_layer + 1) - 0.5, np.arange(n_samples + 1) - 0.5
    fields = axes.pcolormesh(*edges, ratios, cmap=_COLOUR_MAP, edgecolors="face", linewidth=0.1)
    axes.set_ylim(n_samples - 0.5, -0.5)
    axes.set_yticks(_ticks(n_samples), [str(i + 1) for i in _ticks(n_samples)])
    axes.set_ylabel("sample")
    figure.colorbar(fields, ax=axes, label="lazy ratio", pad=0.02)
    legend: list[Any] = []
    if layers:
        above = axes.get_xaxis_transform()  # x: layers, y: from 0 to 1 over the height of the field
        mark: dict[str, Any] = {"color": STREAMING_COLOUR, "markersize": 5, "transform": above, "clip_on": False}
        legend += axes.plot(sorted(layers), [1.03] * len(layers), "v", label=f"streams ({len(layers)})", **mark)
    if np.ma.is_masked(ratios):
        legend.append(Patch(label="not measured", **not_measured))
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes `stem`.png and `stem`.svg, each as a whole or not at all. Raises OSError."""
    return [save_as(figure, stem.with_name(f"{stem.name}.{suffix}")) for suffix in ("png", "svg")]


def save_as(figure: Figure, path: Path) -> Path:
    """Writes a picture in the format that its name says, as a whole or not at all.

    Raises:
        ValueError: the name ends in neither .png nor .svg.
        OSError: the file can't be written.
    """
    import matplotlib

    suffix = path.suffix.lower()
    if suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: must end in .png or .svg")
    settings: dict[str, Any] = {"metadata": {"Date": None}} if suffix == ".svg" else {"dpi": _DPI}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with matplotlib.rc_context({"svg.hashsalt": _SVG_SALT}):
            figure.savefig(unfinished, format=suffix[1:], facecolor="white", **settings)
        return unfinished.replace(path)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()


def new_figure(title: str, subtitle: str, width: float = 7.0, height: float = 4.4) -> tuple[Figure, Axes]:
    """A figure with axes, in inches. It is nobody's current one, so nothing is kept after it and no screen is needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(plain(title), fontsize=12)
    axes.set_title(plain(subtitle), fontsize=9, color="#444444", pad=12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def layer_figure(n_layer: int, title: str, subtitle: str) -> tuple[Figure, Axes]:
    """The same with an axis of layers."""
    figure, axes = new_figure(title, subtitle, min(16.0, max(7.0, 0.2 * n_layer)), _HEIGHT)
    axes.set_xlim(-0.6, n_layer - 0.4)
    axes.set_xticks(_ticks(n_layer))
    axes.set_xlabel("layer")
    return figure, axes


def plain(text: str) -> str:
    """A text in which no $ begins a formula."""
    return text.replace("$", r"\$")


def _style(streams: bool) -> dict[str, Any]:
    if streams:
        return {"facecolor": STREAMING_COLOUR, "edgecolor": "white", "hatch": "///", "linewidth": 0.6}
    return {"facecolor": FULL_COLOUR, "edgecolor": "#888888", "linewidth": 0.6}


def _ticks(n: int) -> list[int]:
    step = next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, 100, 1000) if n <= _ALL_TICKS * step or step == 1000)
    return list(range(0, n, step))
