"""Chooses as few streaming layers as a KV budget allows, with any strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lt_gguf.memory.budget import format_mib, peak_bytes, smallest_number
from lt_gguf.memory.kv import DEFAULT_N_UBATCH, KVShape
from lt_gguf.selection.base import Request, Selection, Strategy
from lt_gguf.spec import DEFAULT_PREFILL, format_layers
from lt_gguf.spec.cache_types import DEFAULT_CACHE_TYPE


def select_within(
    strategy: Strategy,
    request: Request,
    shape: KVShape,
    budget: int,
    n_ctx: int,
    *,
    n_embd: int,
    prefill: str = DEFAULT_PREFILL,
    cache_type: str = DEFAULT_CACHE_TYPE,
    cache_keep: Sequence[int] = (),
    n_ubatch: int = DEFAULT_N_UBATCH,
) -> Selection:
    """What `strategy` chooses with as few streaming layers as the budget allows; the reason says so.

    The request's fraction doesn't count. A strategy whose number of layers is its own (`threshold`, `manual`, `preset`)
    chooses as it does without a budget, and is refused if that doesn't fit.

    Args:
        n_embd: elements of a hidden state.
        cache_keep: layers whose cache isn't quantized.

    Raises:
        ValueError: nothing fits, or as `Strategy.select` and `smallest_number`.
    """
    settings: dict[str, Any] = {"n_embd": n_embd, "prefill": prefill, "cache_type": cache_type, "n_ubatch": n_ubatch}
    settings["cache_keep"] = cache_keep

    def size(selection: Selection) -> int:
        return peak_bytes(shape, selection.layers, sink=selection.sink, window=selection.window, n_ctx=n_ctx, **settings)

    at_peak = " at its peak" if prefill == "full" else ""
    kept = f", not in {format_layers(cache_keep)}" if cache_keep else ""
    what = f"the KV cache of {n_ctx} tokens ({cache_type}{kept}){at_peak}"
    if not strategy.counts:
        selection = strategy.select(replace(request, n_streaming=None))
        if size(selection) <= budget:
            return _with_reason(selection, f"{what} takes {format_mib(size(selection))} of a budget of {format_mib(budget)}")
        raise ValueError(
            f"selection {selection.strategy}: with {len(selection.layers)} streaming layers {what} takes "
            f"{format_mib(size(selection))}, more than the KV budget of {format_mib(budget)}: must be {strategy.instead}"
        )

    may_stream = request.model.may_stream
    least = smallest_number(shape, budget, n_ctx, may_stream=may_stream, sink=request.sink, window=request.window, **settings)
    for n in range(least, len(may_stream) + 1):
        selection = strategy.select(replace(request, n_streaming=n))
        if size(selection) <= budget:
            said = f"{n} is the smallest number with which {what} fits into {format_mib(budget)}, it takes {format_mib(size(selection))}"
            return _with_reason(selection, said)
    # note: of a small context, streaming layers can take more than others
    raise ValueError(
        f"selection {strategy.name}: whatever number of layers it chooses, {what} takes more than the KV budget of {format_mib(budget)}: "
        "must be a larger budget, or a smaller context, window or cache type"
    )


def _with_reason(selection: Selection, text: str) -> Selection:
    return replace(selection, reason=f"{selection.reason}; {text}")
