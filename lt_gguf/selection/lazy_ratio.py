"""`lazy-ratio`: the layers with the highest lazy ratio stream (arXiv 2410.13846, section 3, Test mode)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from lt_gguf.selection.base import Request, Selection, Strategy


class LazyRatio(Strategy):
    """The share `fraction` of the measured layers that has the highest mean lazy ratio over all samples."""

    name = "lazy-ratio"
    needs_ratios = True

    def choose(self, request: Request) -> Selection:
        assert request.ratios is not None
        measured, mean = request.measured_layers, request.mean_ratios
        layers = laziest(mean[: request.model.n_layer_main].tolist(), request.count(len(measured)))
        return self.selection(request, layers, _reason(layers, measured, mean.tolist(), len(request.ratios)))


def laziest(ratios: Sequence[float], n_streaming: int) -> tuple[int, ...]:
    """The `n_streaming` layers with the highest ratios, ascending; NaN: the layer isn't among the candidates.

    The paper's way: the layers come one after the other, and a priority queue holds the P laziest-last ones, that is the
    ones with the lowest ratios, which stay full; when it grows beyond P, the layer with the highest ratio leaves it and
    streams. Of layers with the same ratio the ones with the lower numbers stay full.
    """
    candidates = [il for il, ratio in enumerate(ratios) if not math.isnan(ratio)]
    n_full = len(candidates) - n_streaming
    full: list[tuple[float, int]] = []  # note: heapq gives the smallest first, so both are negative
    streaming: list[int] = []
    for il in candidates:
        heapq.heappush(full, (-ratios[il], -il))
        if len(full) > n_full:
            streaming.append(-heapq.heappop(full)[1])
    return tuple(sorted(streaming))


def _reason(layers: tuple[int, ...], measured: list[int], ratios: list[float], n_samples: int) -> str:
    what = f"the highest mean lazy ratio over {n_samples} {'sample' if n_samples == 1 else 'samples'}"
    if not layers:
        return f"none of {len(measured)} measured layers is to stream"
    lowest = min(ratios[il] for il in layers)
    text = f"{len(layers)} of {len(measured)} measured layers have {what}: {lowest:.4f} or more"
    full = [ratios[il] for il in measured if il not in layers]
    return f"{text}, where the full layers have {max(full):.4f} or less" if full else text
