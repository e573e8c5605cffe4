"""`frequency`: the layers that are most often among the lazy half stream (arXiv 2410.13846, section 4, Train mode)."""

from __future__ import annotations

from lt_gguf.selection.base import Request, Selection, Strategy
from lt_gguf.selection.lazy_ratio import laziest


class Frequency(Strategy):
    """The layers that are in the lazier half of the model in the most samples.

    Which layers are lazy differs from text to text; this asks how often instead of how much, so that one unusual sample
    can't decide. The half is the paper's, whatever share of the layers is to stream. Of layers that are equally often in it,
    those with the higher mean ratio stream, and of equal ones again those with the higher numbers.
    """

    name = "frequency"
    needs_ratios = True

    def choose(self, request: Request) -> Selection:
        assert request.ratios is not None
        measured, mean = request.measured_layers, request.mean_ratios
        n_main = request.model.n_layer_main
        times = dict.fromkeys(measured, 0)
        for sample in request.ratios:
            for il in laziest(sample[:n_main].tolist(), len(measured) // 2):
                times[il] += 1
        order = sorted(measured, key=lambda il: (times[il], mean[il], il))
        layers = order[len(order) - request.count(len(measured)) :]
        reason = f"none of {len(measured)} measured layers is to stream"
        if layers:
            least = min(times[il] for il in layers)
            reason = (
                f"{len(layers)} of {len(measured)} measured layers are most often in the lazy half: "
                f"in {least} or more of {len(request.ratios)} samples"
            )
        return self.selection(request, layers, reason)
