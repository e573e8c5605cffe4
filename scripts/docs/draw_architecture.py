"""Draws docs/explanation/architecture.svg: the way of a spec through the rooms, and one token in a full and in a streaming layer.

    python scripts/docs/draw_architecture.py [OUT.svg]

Written as SVG by hand, so it needs no package, and the same script gives the same file. It is as wide as a phone, and its background
is white on a dark page too. Its numbers are those of a small model that doesn't exist: 8 layers, 22 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).parents[2] / "docs" / "explanation" / "architecture.svg"

RATIOS = (0.41, 0.93, 0.62, 0.97, 0.88, 0.55, 0.91, 0.35)
STREAMING = (1, 3, 4, 6)
SINK, WINDOW, N_TOKENS = 2, 6, 22

# As in lt_gguf/report/plots.py: the two differ in print, too, and every part has its name beside it.
STREAMING_COLOUR, FULL_COLOUR = "#0072B2", "#D9D9D9"
TEXT, QUIET, LINE, PAPER, BOX, TAG = "#222222", "#595959", "#8A8A8A", "#FFFFFF", "#F7F7F7", "#E3EFF7"

WIDTH, MARGIN, PADDING = 420, 14, 12
INNER = WIDTH - 2 * MARGIN
CELL = 15.6
SANS = "Verdana, 'DejaVu Sans', Arial, sans-serif"
MONO = "'DejaVu Sans Mono', Menlo, Consolas, monospace"


class Drawing:
    """SVG elements from top to bottom; `y` is where the next one begins."""

    def __init__(self) -> None:
        self.y = 0.0
        self._elements: list[str] = []

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, line: str = "none", more: str = "") -> None:
        box = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self._elements.append(f'<rect {box} fill="{fill}" stroke="{line}" {more}/>')

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        self._elements.append(f'<text x="{x:g}" y="{y:g}" class="{kind or "t"}" text-anchor="{anchor}">{escape(words)}</text>')

    def path(self, points: str, more: str = "") -> None:
        self._elements.append(f'<path d="{points}" fill="none" stroke="{LINE}" {more}/>')

    def heading(self, words: str) -> None:
        self.text(MARGIN, self.y + 30, words, "h")
        self.y += 42

    def arrow(self, words: str = "") -> None:
        """Down, from what was drawn last to what comes next, with what goes along it."""
        x, length = MARGIN + 28, 26
        self.path(f"M {x} {self.y + 3:g} V {self.y + length - 4:g}", 'stroke-width="1.5" marker-end="url(#head)"')
        self.text(x + 14, self.y + length / 2 + 5, words, "q")
        self.y += length

    def box(self, rooms: Sequence[str], title: str, lines: Sequence[str] = (), mono: bool = False, room_for: float = 0) -> float:
        """A box with its rooms as tags, a title and lines; returns where `room_for` more begins in it."""
        top = self.y
        height = 54 + 18 * len(lines) + room_for
        self.rectangle(MARGIN, top, INNER, height, BOX, "#C8C8C8", 'rx="6"')
        x = MARGIN + PADDING
        for name in rooms:
            width = 6.9 * len(name) + 12
            self.rectangle(x, top + 9, width, 17, TAG, more='rx="3"')
            self.text(x + 6, top + 21.5, name, "r")
            x += width + 6
        self.text(MARGIN + PADDING, top + 44, title, "b")
        for i, line in enumerate(lines):
            self.text(MARGIN + PADDING, top + 63 + 18 * i, line, "m" if mono else "t")
        self.y = top + height
        return top + 54 + 18 * len(lines)

    def svg(self) -> str:
        height = self.y + MARGIN
        style = (
            f".t,.b,.q,.h,.l{{font-family:{SANS};fill:{TEXT}}}.t,.b{{font-size:12.5px}}.b{{font-weight:bold;font-size:13px}}"
            f".h{{font-weight:bold;font-size:16px}}.q,.l{{font-size:11.5px;fill:{QUIET}}}"
            f".m,.r{{font-family:{MONO};fill:{TEXT};font-size:11.5px}}"
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
                f'width="{WIDTH}" height="{height:g}" role="img">',
                "<title>The way of a spec through the rooms, and one token in the runtime</title>",
                "<desc>Lazy ratios of a checkpoint's layers, a strategy that chooses layers, the spec, the keys of a GGUF file, the "
                "runtime. There a full layer's query sees all tokens, a streaming layer's only sinks and window.</desc>",
                f"<style>{style}</style>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
                f'<path d="M 0 0 L 8 4 L 0 8 z" fill="{LINE}"/></marker></defs>',
                f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="{PAPER}"/>',
                *self._elements,
                "</svg>\n",
            ]
        )


def draw_ratios(drawing: Drawing, y: float) -> None:
    """A bar for each layer, the chosen ones in the colour of streaming layers."""
    left, height, width, step = MARGIN + PADDING, 44, 34, (INNER - 2 * PADDING - 34) / (len(RATIOS) - 1)
    for layer, ratio in enumerate(RATIOS):
        x = left + step * layer
        fill = STREAMING_COLOUR if layer in STREAMING else FULL_COLOUR
        drawing.rectangle(round(x, 1), y + height * (1 - ratio), width, height * ratio, fill)
        drawing.text(round(x + width / 2, 1), y + height + 14, str(layer), "l", "middle")


def draw_layer(drawing: Drawing, y: float, name: str, streams: bool) -> None:
    """A cell for each token, filled where the query of the last one sees its key."""
    left = MARGIN + PADDING + (INNER - 2 * PADDING - CELL * N_TOKENS) / 2
    drawing.text(left, y + 11, name, "b")
    drawing.text(left + CELL * N_TOKENS, y + 11, f"token {N_TOKENS - 1}", "l", "end")
    y += 18
    for position in range(N_TOKENS):
        held = not streams or position < SINK or N_TOKENS - 1 - position < WINDOW
        fill = (STREAMING_COLOUR if streams else FULL_COLOUR) if held else PAPER
        edge = 'stroke-dasharray="2 2"' if not held else ""
        drawing.rectangle(left + CELL * position + 1, y, CELL - 2.6, 17, fill, "#BDBDBD" if not held else "none", edge)
    last = left + CELL * (N_TOKENS - 1)
    drawing.rectangle(last - 0.4, y - 1.4, CELL + 0.2, 19.8, "none", TEXT, 'stroke-width="1.6"')
    if streams:
        parts = [(0, SINK, "sinks"), (SINK, N_TOKENS - WINDOW, "dropped"), (N_TOKENS - WINDOW, N_TOKENS, "window")]
    else:
        parts = [(0, N_TOKENS, "every token of the conversation")]
    for begin, end, words in parts:
        x0, x1 = left + CELL * begin + 2, left + CELL * end - 2
        drawing.path(f"M {x0:g} {y + 21:g} v 5 H {x1:g} v -5")
        drawing.text(max((x0 + x1) / 2, left + 16), y + 39, words, "l", "middle")


def draw() -> str:
    flags = ",".join(str(int(layer in STREAMING)) for layer in range(5))
    keys = [f"llama.attention.streaming.layers = [{flags},…]", f"….sink = {SINK}, ….window = {WINDOW}, ….prefill = full"]
    drawing = Drawing()
    drawing.heading("How a spec comes to be")
    drawing.box(["models", "checkpoint", "training"], "A checkpoint", ["as it was trained, or taught to stream"])
    drawing.arrow("one layer's weights at a time, and texts to read")
    where = drawing.box(["calibration", "hf"], "The lazy ratio of each layer", room_for=66)
    draw_ratios(drawing, where)
    drawing.arrow("one number in [0, 1] a layer")
    drawing.box(["selection", "memory", "statistics"], "A strategy chooses", ["the laziest half, what loses least, what fits, …"])
    drawing.arrow("layers 1, 3, 4 and 6 are to stream")
    drawing.box(["spec"], "The spec", [f"layers=1,3-4,6;sink={SINK};window={WINDOW};prefill=full"], mono=True)
    drawing.arrow("metadata, beside what upstream's converter writes")
    drawing.box(["conversion", "gguf"], "The GGUF file", keys, mono=True)

    drawing.y += 22
    drawing.heading("How a token is decoded")
    token = N_TOKENS - 1
    lines = [
        "The spec is the file's, or what overrides it.",
        f"Token {token}: its key and value go into each layer's",
        "cache, its query sees the filled cells.",
    ]
    where = drawing.box(["runtime"], "Llama, and the patched libllama below it", lines, room_for=188)
    draw_layer(drawing, where + 4, "layer 0, full", streams=False)
    draw_layer(drawing, where + 72, f"layer 1, streams: {SINK} + {WINDOW} tokens", streams=True)
    drawing.text(WIDTH / 2, where + 152, "… layers 2 to 7, each as the spec says …", "q", "middle")
    drawing.text(MARGIN + PADDING, where + 177, f"After the last layer: the logits for token {N_TOKENS}.")
    drawing.arrow("log-probabilities and answers, full and hybrid")
    drawing.box(["report", "evaluation", "bench", "analysis"], "What is lost, how fast it is, and why")
    drawing.arrow()
    drawing.box(
        ["documents", "chat", "llm_plugin", "server", "cli"],
        "The commands",
        ["convert, train, inspect, analyze, flag, eval, bench,", "run, chat about documents, serve, cache, doctor"],
    )
    return drawing.svg()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = f"(default: {OUT.relative_to(OUT.parents[2])})"
    parser.add_argument("out", nargs="?", type=Path, default=OUT, metavar="OUT.svg", help=f"file to write {default}")
    out = parser.parse_args().out
    try:
        out.write_text(draw(), encoding="utf-8")
    except OSError as error:
        parser.error(f"{out}: can't be written ({error.strerror})")


if __name__ == "__main__":
    main()
