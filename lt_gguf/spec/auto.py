"""Layers that the runtime chooses for the prompt at hand: `AutoSpec`, and the text in which it says what streams now."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lt_gguf.spec.fields import (
    CACHE_KEEP,
    bad_value,
    check_fraction,
    check_integer,
    is_auto,
    parse_fraction,
    parse_integer,
    split_fields,
)
from lt_gguf.spec.layers import format_layers, parse_layers
from lt_gguf.spec.streaming import DEFAULT_FRACTION, DEFAULT_SINK, DEFAULT_WINDOW, StreamingSpec

DEFAULT_AUTO_W_LAST = 16  # measured while somebody waits: half the cost of 32, and 8 to 64 choose alike (the paper's ablation)
MAX_W_LAST = 1024  # the runtime keeps a query for each
_MOST_LAYERS = 512  # of llama.cpp; a text of this kind doesn't know its model
Lazy = Literal["mean", "min"]
LAZY: tuple[Lazy, ...] = get_args(Lazy)
DEFAULT_LAZY: Lazy = "min"  # a mean can't see the one head that finds what is far away (docs/evidence/results.md)


@dataclass(frozen=True)
class AutoSpec:
    """Lets the runtime choose the streaming layers for the prompt at hand: those with the highest lazy ratio.

    The first prompt of a conversation is read with full attention, as every prompt (`prefill = full`); at its end the
    lazy ratio of each layer is measured and the laziest layers begin to stream (Test mode of arXiv 2410.13846). A ratio is the
    share of one head's one query's attention that goes to sinks and window; that of a layer is the smallest of them, so that a
    head that once looks far away keeps its layer, or, as in the paper (section 3), their mean.

    Args:
        fraction: share of the layers that stream, rounded down; 0 measures only.
        sink: number of first positions that stay visible.
        window: number of last positions that stay visible, the query's own included.
        w_last: number of last queries of the prompt that the ratios are measured on.
        lazy: what a layer's ratio is of those of its heads and queries, `min` or `mean`.
        cache_keep: indices of layers, streaming or not, whose KV cache is f16 where it would be quantized.

    Raises:
        ValueError: a field is out of range; the message names it and says what is allowed.
    """

    fraction: float = DEFAULT_FRACTION
    sink: int = DEFAULT_SINK
    window: int = DEFAULT_WINDOW
    w_last: int = DEFAULT_AUTO_W_LAST
    lazy: Lazy = DEFAULT_LAZY
    cache_keep: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        object.__setattr__(self, "fraction", float(self.fraction))
        object.__setattr__(self, "sink", check_integer("sink", self.sink, 0))
        object.__setattr__(self, "window", check_integer("window", self.window, 1))
        object.__setattr__(self, "w_last", check_integer("w_last", self.w_last, 1, MAX_W_LAST))
        if self.lazy not in LAZY:
            bad_value("lazy", f'"{self.lazy}"', '"mean" or "min"')
        keep = tuple(sorted({check_integer(CACHE_KEEP, il, 0, _MOST_LAYERS - 1) for il in self.cache_keep}))
        object.__setattr__(self, CACHE_KEEP, keep)

    def n_streaming(self, n_layer: int) -> int:
        """How many of `n_layer` layers come to stream."""
        return int(self.fraction * n_layer + 1e-4)  # note: 0.7 * 10 must be 7

    @classmethod
    def parse(cls, text: str, base: StreamingSpec | None = None) -> AutoSpec:
        """Reads `auto:0.5` or `auto=0.5;sink=4;window=1020;w_last=16;lazy=min`; a sink or a window that is left out is that of
        `base` (the file's spec), what else is left out has its default.

        Raises:
            ValueError: the text is malformed.
        """
        example = "auto:0.5 or auto=0.5;sink=4;window=1020;w_last=16;lazy=min"
        fields: dict[str, Any] = {} if base is None else {"sink": base.sink, "window": base.window}
        for key, value in split_fields(runtime_text(text), example).items():
            if key == "auto":
                fields["fraction"] = parse_fraction(value)
            elif key in ("sink", "window", "w_last"):
                fields[key] = parse_integer(key, value)
            elif key == "lazy":
                fields[key] = value
            elif key == CACHE_KEEP:
                if value == "all" and base is None:
                    bad_value(
                        CACHE_KEEP,
                        '"all"',
                        "layers and ranges of layers, as in 1,3,5-9, where the layers are chosen for the prompt",
                    )
                fields[key] = parse_layers(value, _MOST_LAYERS if base is None else base.n_layer, key)
            elif key == "prefill":
                if value != "full":
                    bad_value("prefill", f'"{value}"', '"full" where the layers are chosen for the prompt')
            elif key == "layers":
                raise ValueError("layers: are chosen for the prompt, must not be given beside auto")
            else:
                raise ValueError(f"{key}: unknown key, must be one of auto, sink, window, w_last, lazy, cache_keep")
        return cls(**fields)

    def __str__(self) -> str:
        fraction = f"{self.fraction:.6f}".rstrip("0").rstrip(".")
        keep = f";{CACHE_KEEP}={format_layers(self.cache_keep)}" if self.cache_keep else ""
        return f"auto={fraction};sink={self.sink};window={self.window};w_last={self.w_last};lazy={self.lazy}{keep}"


def runtime_text(spec: StreamingSpec | AutoSpec | str) -> str:
    """The text of a spec as the runtime takes it: `auto=0.5` for `auto:0.5`."""
    return re.sub(r"^\s*auto\s*:", "auto=", str(spec))


def parse_running(text: str, n_layer: int) -> tuple[StreamingSpec, AutoSpec | None]:
    """Reads what the runtime says of a context: what streams now and, if it chooses the layers itself, how.

    The text of the latter is `auto=0.5;layers=…;sink=…;window=…;prefill=full;w_last=…;lazy=…`.

    Raises:
        ValueError: the text is malformed.
    """
    if not is_auto(text):
        return StreamingSpec.parse(text, n_layer), None
    items = [item.strip() for item in text.split(";")]
    auto = AutoSpec.parse(";".join(item for item in items if not item.startswith("layers")))
    streaming = ";".join(item for item in items if not item.startswith(("auto", "w_last", "lazy")))
    return StreamingSpec.parse(streaming, n_layer), auto
