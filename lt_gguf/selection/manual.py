"""`manual`: the layers that the user names."""

from __future__ import annotations

from lt_gguf.selection.base import Request, Selection, Strategy
from lt_gguf.spec import parse_layers


class Manual(Strategy):
    """The layers of `request.layers`: `1,3,5-9`, `all` (that can stream) or `none`."""

    name = "manual"
    takes_layers = True
    counts = False
    instead = "more of them, a larger budget or a smaller context"

    def choose(self, request: Request) -> Selection:
        assert request.layers is not None
        n_main = request.model.n_layer_main
        layers = parse_layers(request.layers, n_main)
        return self.selection(request, layers, f"{len(layers)} of {n_main} layers, named by hand")
