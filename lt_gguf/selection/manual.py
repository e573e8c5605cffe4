"""`manual`: the layers that the user names."""

from __future__ import annotations

from lt_gguf.selection.base import Request, Selection, Strategy
from lt_gguf.spec import format_layers, parse_layers


class Manual(Strategy):
    """The layers of `request.layers`: `1,3,5-9`, `all` (that can stream) or `none`."""

    name = "manual"
    takes_layers = True
    counts = False
    instead = "more of them, a larger budget or a smaller context"

    def choose(self, request: Request) -> Selection:
        assert request.layers is not None
        model = request.model
        layers = parse_layers(request.layers, model.n_layer_main, every=model.may_stream)
        if wrong := sorted(set(layers) - set(model.may_stream)):
            raise ValueError(
                f"selection {self.name}: layer {wrong[0]} has no full attention, must be of those that may stream: "
                f"{format_layers(model.may_stream)}"
            )
        return self.selection(request, layers, f"{len(layers)} of {model.n_candidates} layers, named by hand")
