"""`trained`: the layers that a checkpoint was trained to stream in, as its own config.json says (arXiv 2410.13846, section 4)."""

from __future__ import annotations

from lt_gguf.selection.base import Request, Selection, Strategy
from lt_gguf.spec import DEFAULT_SINK, DEFAULT_WINDOW
from lt_gguf.spec.in_config import KEY, read_spec


class Trained(Strategy):
    """The layers, sinks, window and prefill mode of LightTransfer-Train (`lt_gguf.training`); the selection
    is called what chose them there.

    What a model was trained with isn't changed by the way: other sinks or another window than its own are refused.
    """

    name = "trained"
    counts = False
    instead = "another selection, a larger budget or a smaller context"

    def choose(self, request: Request) -> Selection:
        found = read_spec(request.model.config, request.model.n_layer)
        if found is None:
            raise ValueError(
                f'selection trained: the config.json of {request.model.name} has no "{KEY}", must be of a checkpoint that was '
                "trained to stream (lt-gguf train)"
            )
        spec, provenance = found
        asked = (request.sink, request.window)
        if asked not in ((DEFAULT_SINK, DEFAULT_WINDOW), (spec.sink, spec.window)):
            raise ValueError(
                f"selection trained: the checkpoint was trained with sink {spec.sink} and window {spec.window}, must not be "
                f"given sink {request.sink} and window {request.window}"
            )
        reason = (
            f"the {len(spec.layers)} of {request.model.n_candidates} layers that the checkpoint was trained to stream in, "
            f"chosen by {provenance.selection} before"
        )
        return Selection(provenance.selection, spec.layers, reason, spec.sink, spec.window, prefill=spec.prefill)
