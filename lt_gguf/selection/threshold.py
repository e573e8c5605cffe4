"""`threshold`: every layer that is lazy enough streams, however many these are."""

from __future__ import annotations

from lt_gguf.selection.base import Request, Selection, Strategy

# With ratio r, a streaming layer's attention output differs from the full one's by (1 - r) times the difference between the
# mean value it drops and the mean value it keeps: at 0.9 at most a tenth of the output comes from elsewhere.
DEFAULT_THRESHOLD = 0.9


class Threshold(Strategy):
    """The layers whose mean lazy ratio over all samples is at least `threshold`.

    The share of the layers isn't asked for. Of a KV budget the least number of layers is kept: where the threshold leaves
    too few, the request is refused.
    """

    name = "threshold"
    needs_ratios = True
    takes_threshold = True
    counts = False
    instead = "a lower --threshold, a larger budget or a smaller context"

    def choose(self, request: Request) -> Selection:
        threshold = DEFAULT_THRESHOLD if request.threshold is None else request.threshold
        measured, mean = request.measured_layers, request.mean_ratios
        layers = [il for il in measured if mean[il] >= threshold]
        reason = f"{len(layers)} of {len(measured)} measured layers have a mean lazy ratio of at least {threshold:g}"
        return self.selection(request, layers, reason)
