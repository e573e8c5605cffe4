"""Which window: a longer one loses less in each streaming layer, a shorter one leaves memory for another full layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lt_gguf.selection.base import Request, Selection
from lt_gguf.selection.evidence import Candidate


def best_window(request: Request, choose: Callable[[Request], Selection]) -> Selection:
    """The best of what is chosen with each window: the smallest cache within the tolerance, or, where a number of layers is asked for,
    the smallest divergence at equal memory.

    Equal memory: with another window as many layers stream as are needed to take no more than the asked number does with the
    request's own. Caches are compared at `n_ctx` tokens, as if the layers' were all of one size.

    Args:
        request: whose `windows` are tried, and its own `window`.
        choose: chooses with the window of a request.
    """
    assert request.candidates is not None
    n_candidates = request.model.n_candidates
    asked = request.asked_count(n_candidates)
    found: list[Selection] = []
    for window in sorted({request.window, *request.windows}):
        other = request.candidates.with_window(window)
        # note: lazy ratios are of the request's own window
        ratios = request.ratios if window == request.window else None
        one = replace(request, window=window, windows=(), candidates=other, ratios=ratios)
        if asked is not None:
            n = _n_at_equal_memory(request, asked, window)
            if n is None:
                continue  # it takes more, however many layers stream
            one = replace(one, n_streaming=n, fraction=None)
        found.append(choose(one))

    def cost(selection: Selection) -> tuple[float, float]:
        kl = _judged(selection).evidence.kl
        memory = cells(n_candidates, len(selection.layers), request.sink, selection.window, request.n_ctx)
        return (memory, kl) if asked is None else (kl, memory)

    best = min(found, key=cost)
    tried = [
        Candidate(f"window {selection.window}, {len(selection.layers)}", selection.layers, _judged(selection).evidence)
        for selection in found
    ]
    full = n_candidates * request.n_ctx
    memory = (
        f"{cells(n_candidates, len(each.layers), request.sink, each.window, request.n_ctx) / full:.0%} with {each.window}"
        for each in found
    )
    reason = f"{best.reason}; of the full cache at {request.n_ctx:,} tokens it takes {', '.join(memory)} tokens of window"
    return replace(best, reason=reason, candidates=(*best.candidates, *tried))


def cells(n_layer: int, n_streaming: int, sink: int, window: int, n_ctx: int) -> int:
    """Tokens that the caches of all layers keep of `n_ctx`."""
    return (n_layer - n_streaming) * n_ctx + n_streaming * min(n_ctx, sink + window)


def _n_at_equal_memory(request: Request, n_asked: int, window: int) -> int | None:
    n_candidates, sink, n_ctx = request.model.n_candidates, request.sink, request.n_ctx
    allowed = cells(n_candidates, n_asked, sink, request.window, n_ctx)
    return next((n for n in range(n_candidates + 1) if cells(n_candidates, n, sink, window, n_ctx) <= allowed), None)


def _judged(selection: Selection) -> Candidate:
    """What was measured of a selection on the questions that it wasn't chosen by."""
    judged = [candidate for candidate in selection.candidates if candidate.name.startswith(f"{selection.strategy}, ")]
    return next(candidate for candidate in judged if candidate.layers == selection.layers)
