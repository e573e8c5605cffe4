"""Draws docs/cache.svg, the picture of the idea at the top of the README and of the site.

    python scripts/docs/draw_cache.py [OUT.svg]

Needs matplotlib. The picture is a drawing, not a measurement; its numbers are those of the small cache that it shows.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

OUT = Path(__file__).parents[2] / "docs" / "cache.svg"

N_LAYER, N_TOKENS, SINK, WINDOW = 8, 32, 2, 8
STREAMING_LAYERS = {1, 3, 5, 7}
HELD, SINK_COLOUR, WINDOW_COLOUR, DROPPED = "#4c78a8", "#e45756", "#f2a33a", "#eceff3"


def colour(position: int, streams: bool) -> str:
    if not streams:
        return HELD
    if position < SINK:
        return SINK_COLOUR
    return WINDOW_COLOUR if N_TOKENS - position <= WINDOW else DROPPED


def draw(axes, title: str, streaming: set[int]) -> None:
    for layer in range(N_LAYER):
        for position in range(N_TOKENS):
            face = colour(position, layer in streaming)
            axes.add_patch(Rectangle((position, layer), 0.86, 0.8, color=face, linewidth=0))
        label = f"layer {layer}" + ("  streams" if layer in streaming else "")
        axes.text(-0.6, layer + 0.4, label, ha="right", va="center", fontsize=9, color="#333333")
    cells = sum(N_TOKENS if layer not in streaming else SINK + WINDOW for layer in range(N_LAYER))
    axes.set_title(f"{title}: {cells} of {N_LAYER * N_TOKENS} cells", fontsize=12, pad=10, color="#222222")
    axes.set_xlim(-8, N_TOKENS)
    axes.set_ylim(N_LAYER + 0.2, -0.2)
    axes.set_axis_off()
    axes.annotate("", (N_TOKENS, N_LAYER + 0.55), (0, N_LAYER + 0.55), annotation_clip=False,
                  arrowprops={"arrowstyle": "->", "color": "#666666"})  # fmt: skip
    axes.text(N_TOKENS / 2, N_LAYER + 0.85, "tokens of the conversation", ha="center", va="top", fontsize=9, color="#666666")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=OUT, metavar="OUT.svg", help="file to write (default: docs/cache.svg)")
    out = parser.parse_args().out
    plt.rcParams["svg.hashsalt"] = "lt-gguf"  # the same drawing gives the same file
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 3.9))
    draw(left, "Full attention", set())
    draw(right, "Hybrid", STREAMING_LAYERS)
    names = [("keys and values of a full layer", HELD), (f"sink: the first {SINK} tokens", SINK_COLOUR),
             (f"window: the last {WINDOW} tokens", WINDOW_COLOUR), ("dropped", DROPPED)]  # fmt: skip
    handles = [Rectangle((0, 0), 1, 1, color=face) for _, face in names]
    figure.legend(handles, [name for name, _ in names], loc="lower center", ncol=4, frameon=False, fontsize=10)
    figure.patch.set_facecolor("white")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.88, bottom=0.24, wspace=0.03)
    try:
        figure.savefig(out, format="svg", metadata={"Date": None})
    except OSError as error:
        parser.error(f"{out}: can't be written ({error.strerror})")


if __name__ == "__main__":
    main()
