"""Lists of layers as people write them: `1,3,5-9`, `all` or `none`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NoReturn

from lt_gguf.spec.fields import bad_value


def parse_layers(text: str, n_layer: int, what: str = "layers", every: Iterable[int] = ()) -> tuple[int, ...]:
    """Reads `1,3,5-9`, `all` or `none`; `what` is the name that errors have for them, and `every` what `all` means, if not all of them.

    Raises:
        ValueError: the text is malformed or names a layer that the model doesn't have.
    """
    text = text.strip()
    if text in ("all", "none"):
        return (tuple(every) or tuple(range(n_layer))) if text == "all" else ()
    layers: set[int] = set()
    for item in text.split(","):
        ends = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", item)
        if not ends:
            bad_layers(item.strip(), n_layer, what)
        first = int(ends[1])
        last = int(ends[2] or ends[1])
        if not first <= last < n_layer:
            bad_layers(item.strip(), n_layer, what)
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def format_layers(layers: Iterable[int]) -> str:
    """The shortest text for layers: `1,3,5-9`."""
    runs: list[list[int]] = []
    for il in sorted(layers):
        if runs and il == runs[-1][1] + 1:
            runs[-1][1] = il
        else:
            runs.append([il, il])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def bad_layers(item: str, n_layer: int, what: str = "layers") -> NoReturn:
    """Raises ValueError: `item` names no layers of a model of `n_layer` layers."""
    bad_value(
        what,
        f'"{item}"',
        f'"all", "none", or layers and ranges of layers from 0 to {n_layer - 1}, as in 1,3,5-9',
    )
