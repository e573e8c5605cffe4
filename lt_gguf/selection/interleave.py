"""`interleave-odd` and `interleave-even`: layers spread evenly, without a measurement.

On some models this is better than the lazy ratio, on others worse (arXiv 2512.10411, appendix F), so both are worth trying.
"""

from __future__ import annotations

import math
from fractions import Fraction

from lt_gguf.selection.base import Request, Selection, Strategy
from lt_gguf.spec import StreamingSpec


class InterleaveOdd(Strategy):
    """The last layer of each group streams: with half of the layers 1, 3, 5, …, with a quarter 3, 7, 11, …"""

    name = "interleave-odd"

    def choose(self, request: Request) -> Selection:
        layers = StreamingSpec.interleaved(request.model.n_layer_main, _share(request)).layers
        return self.selection(request, layers, _reason(layers, request, "odd"))


class InterleaveEven(Strategy):
    """The first layer of each group streams: with half of the layers 0, 2, 4, …, with a quarter 0, 4, 8, …"""

    name = "interleave-even"

    def choose(self, request: Request) -> Selection:
        share = Fraction(_share(request)).limit_denominator(10_000)
        n_streaming = request.count(request.model.n_layer_main)
        layers = [math.floor(i / share) for i in range(n_streaming)]
        return self.selection(request, layers, _reason(layers, request, "even"))


def _share(request: Request) -> float | Fraction:
    """The share of the layers that streams: what was asked for, or what the budget's number is."""
    n_main = request.model.n_layer_main
    return request.share if request.n_streaming is None else Fraction(request.count(n_main), n_main)


def _reason(layers: list[int] | tuple[int, ...], request: Request, which: str) -> str:
    n_main = request.model.n_layer_main
    every_second = len(layers) == n_main // 2 and set(layers) <= set(range(which == "odd", n_main, 2))
    spread = f"every second one, the {which} ones" if layers and every_second else "spread evenly"
    return f"{len(layers)} of {n_main} layers, {spread}; nothing was measured for this choice"
