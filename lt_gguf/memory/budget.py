"""How many layers must stream so that the KV cache fits into a budget. (`selection.within_budget` chooses them.)

The sizes are `kv_memory`'s, which are what the runtime allocates. What streaming layers take besides while a long prompt is
read with full attention (`prefill = full`) isn't in them: it is as large as the prompt, is given back at the prompt's end, and
has a bound of its own (`--prompt-limit`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lt_gguf.memory.kv import DEFAULT_N_UBATCH, KVShape, kv_memory
from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.cache_types import DEFAULT_CACHE_TYPE


def smallest_number(
    shape: KVShape,
    budget: int,
    n_ctx: int,
    *,
    n_layer_main: int,
    sink: int,
    window: int,
    cache_type: str = DEFAULT_CACHE_TYPE,
    n_ubatch: int = DEFAULT_N_UBATCH,
) -> int:
    """The smallest number of streaming layers with which the KV cache of one sequence fits into `budget` bytes.

    Where layers differ in their KV heads this is the number of the right layers, those that save most; others may need
    more, see `selection.within_budget`.

    Args:
        n_ctx: context size in tokens.
        n_layer_main: the layers 0 to n_layer_main - 1 may stream.

    Raises:
        ValueError: it doesn't fit even with all of them streaming, the message says what the least is; or the context, the
            cache type, sink or window is out of range.
    """
    if n_ctx < 1:
        raise ValueError(f"context = {n_ctx}: must be at least 1 token")
    settings: dict[str, Any] = {"sink": sink, "window": window, "n_ctx": n_ctx, "cache_type": cache_type, "n_ubatch": n_ubatch}
    by_saving = sorted(range(n_layer_main), key=lambda il: (-shape.token_bytes(il, cache_type), il))
    for n in range(n_layer_main + 1):
        if kv_bytes(shape, by_saving[:n], **settings) <= budget:
            return n
    # note: where the other layers are quantized, a streaming layer can take more than a small context would
    least = min(kv_bytes(shape, by_saving[:n], **settings) for n in range(n_layer_main + 1))
    raise ValueError(
        f"KV budget = {format_mib(budget)}: however many of {n_layer_main} layers stream (sink {sink}, window {window}), a context of "
        f"{n_ctx} tokens takes {format_mib(least)} or more ({cache_type}), "
        "must be at least that, or a smaller context, window or cache type"
    )


def kv_bytes(shape: KVShape, layers: Sequence[int], *, sink: int, window: int, n_ctx: int, cache_type: str, n_ubatch: int) -> int:
    """Bytes that a context of one sequence allocates for K and V if `layers` stream. Raises ValueError as `kv_memory`."""
    spec = StreamingSpec(tuple(layers), len(shape.n_head_kv), sink, window)
    return kv_memory(shape, spec, n_ctx, type_k=cache_type, n_ubatch=n_ubatch).total


def format_mib(n_bytes: int) -> str:
    """Rounded up, so that a budget of what this says is enough."""
    return f"{math.ceil(n_bytes * 100 / 2**20) / 100:.2f} MiB"


def largest_context(
    shape: KVShape,
    spec: StreamingSpec | None,
    n_bytes: int,
    n_ctx_most: int,
    *,
    cache_type: str = DEFAULT_CACHE_TYPE,
    flash_attn: bool,
) -> int:
    """The largest context of one sequence, a multiple of 1024 tokens or `n_ctx_most`, whose KV cache fits into `n_bytes` at its peak;
    at least 1024, so that a message may be tried.

    Args:
        spec: which layers stream. While a prompt is read with full attention they hold all of it (`prefill = full`).
        n_ctx_most: what the model was trained for, in tokens.
    """

    def fits(n_ctx: int) -> bool:
        # note: in streaming layers of a type of their own, which may be larger than that of the others
        at_peak = replace(spec, window=n_ctx) if spec is not None and spec.prefill == "full" else spec
        return kv_memory(shape, at_peak, n_ctx, type_k=cache_type, flash_attn=flash_attn).total <= n_bytes

    if fits(n_ctx_most):
        return n_ctx_most
    low, high = 1, max(1, n_ctx_most // 1024)  # in steps; low is taken whether or not it fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(1024 * middle) else (low, middle)
    return min(n_ctx_most, 1024 * low)
