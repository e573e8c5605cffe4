"""`interleave-odd` and `interleave-even`: layers spread evenly, without a measurement.

On some models this is better than the lazy ratio, on others worse (arXiv 2512.10411, appendix F), so both are worth trying.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from lt_gguf.selection.base import Request, Selection, Strategy
from lt_gguf.spec import StreamingSpec


class InterleaveOdd(Strategy):
    """The last layer of each group streams: with half of the layers 1, 3, 5, …, with a quarter 3, 7, 11, …"""

    name = "interleave-odd"

    def choose(self, request: Request) -> Selection:
        places = StreamingSpec.interleaved(request.model.n_candidates, _share(request)).layers
        return self.selection(request, _layers(places, request), _reason(places, request, "odd"))


class InterleaveEven(Strategy):
    """The first layer of each group streams: with half of the layers 0, 2, 4, …, with a quarter 0, 4, 8, …"""

    name = "interleave-even"

    def choose(self, request: Request) -> Selection:
        share = Fraction(_share(request)).limit_denominator(10_000)
        n_streaming = request.count(request.model.n_candidates)
        places = [math.floor(i / share) for i in range(n_streaming)]
        return self.selection(request, _layers(places, request), _reason(places, request, "even"))


def _layers(places: Sequence[int], request: Request) -> list[int]:
    """The layers at some places among those that may stream."""
    return [request.model.may_stream[place] for place in places]


def _share(request: Request) -> float | Fraction:
    """The share of the layers that streams: what was asked for, or what the budget's number is."""
    n = request.model.n_candidates
    return request.share if request.n_streaming is None else Fraction(request.count(n), n)


def _reason(places: Sequence[int], request: Request, which: str) -> str:
    n, n_main = request.model.n_candidates, request.model.n_layer_main
    every_second = n == n_main and len(places) == n // 2 and set(places) <= set(range(which == "odd", n, 2))
    spread = f"every second one, the {which} ones" if places and every_second else "spread evenly"
    what = "layers" if n == n_main else "layers with full attention"
    return f"{len(places)} of {n} {what}, {spread}; nothing was measured for this choice"
