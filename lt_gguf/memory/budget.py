"""How many layers must stream so that a context fits into a budget (`selection.within_budget` chooses them), and the largest context
that fits.

The sizes are those that the runtime allocates: `kv_memory`'s, and `prompt_memory`'s of a prompt that fills the context and comes as a
whole, which with `prefill = full` is what a context takes at its peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lt_gguf.memory.kv import DEFAULT_N_UBATCH, KVShape, kv_memory
from lt_gguf.memory.prompt import prompt_memory
from lt_gguf.spec import DEFAULT_PREFILL, StreamingSpec
from lt_gguf.spec.cache_types import DEFAULT_CACHE_TYPE, CacheTypes

SMALLEST_CONTEXT = 1024  # tokens; what is tried even where it doesn't fit

_BATCH_TOKEN = (
    512  # bytes that a token takes in llama.cpp's own tables while a prompt comes as a whole (scripts/bench/prompt_peak.py)
)


def smallest_number(
    shape: KVShape,
    budget: int,
    n_ctx: int,
    *,
    n_embd: int,
    may_stream: Sequence[int],
    sink: int,
    window: int,
    prefill: str = DEFAULT_PREFILL,
    cache_type: str = DEFAULT_CACHE_TYPE,
    cache_keep: Sequence[int] = (),
    n_ubatch: int = DEFAULT_N_UBATCH,
) -> int:
    """The smallest number of streaming layers with which a context of one sequence fits into `budget` bytes, at its peak.

    Where layers differ in their KV heads this is the number of the right layers, those that save most; others may need
    more, see `selection.within_budget`.

    Args:
        n_ctx: context size in tokens.
        n_embd: elements of a hidden state.
        may_stream: the layers that may.
        cache_type: of the layers with full attention, as `CacheTypes.parse` reads it.
        cache_keep: layers whose cache isn't quantized.

    Raises:
        ValueError: it doesn't fit even with all of them streaming, the message says what the least is; or the context, the
            cache type, sink or window is out of range.
    """
    if n_ctx < 1:
        raise ValueError(f"context = {n_ctx}: must be at least 1 token")
    settings: dict[str, Any] = {"sink": sink, "window": window, "prefill": prefill, "cache_type": cache_type, "n_ubatch": n_ubatch}
    settings |= {"n_ctx": n_ctx, "n_embd": n_embd, "cache_keep": cache_keep}
    full = StreamingSpec((), len(shape.n_head_kv), cache_keep=tuple(cache_keep))
    types = CacheTypes.parse(cache_type)

    def token_bytes(il: int) -> int:
        return shape.token_bytes(il, full.cache_type(il, types.k), full.cache_type(il, types.v))

    by_saving = sorted(may_stream, key=lambda il: (-token_bytes(il), il))
    for n in range(len(by_saving) + 1):
        if peak_bytes(shape, by_saving[:n], **settings) <= budget:
            return n
    # note: where the other layers are quantized, a streaming layer can take more than a small context would
    least = min(peak_bytes(shape, by_saving[:n], **settings) for n in range(len(by_saving) + 1))
    raise ValueError(
        f"KV budget = {format_mib(budget)}: however many of {len(by_saving)} layers stream (sink {sink}, window {window}, prefill "
        f"{prefill}), a context of {n_ctx} tokens takes {format_mib(least)} or more ({cache_type}), "
        "must be at least that, or a smaller context, window or cache type"
    )


def peak_bytes(
    shape: KVShape,
    layers: Sequence[int],
    *,
    n_embd: int,
    sink: int,
    window: int,
    prefill: str,
    n_ctx: int,
    cache_type: str,
    cache_keep: Sequence[int] = (),
    n_ubatch: int,
) -> int:
    """Bytes that a context of one sequence allocates for K, V and a prompt that fills it and comes as a whole, if `layers` stream.
    Raises ValueError as `kv_memory`."""
    spec = StreamingSpec(tuple(layers), len(shape.n_head_kv), sink, window, prefill, cache_keep=tuple(cache_keep))
    types = CacheTypes.parse(cache_type)
    settings: dict[str, Any] = {"type_k": types.k, "type_v": types.v, "n_ubatch": n_ubatch}
    kv = kv_memory(shape, spec, n_ctx, **settings)
    return kv.total + prompt_memory(shape, spec, n_ctx, n_embd=n_embd, **settings).whole


def format_mib(n_bytes: int) -> str:
    """Rounded up, so that a budget of what this says is enough."""
    return f"{math.ceil(n_bytes * 100 / 2**20) / 100:.2f} MiB"


def largest_context(
    shape: KVShape,
    spec: StreamingSpec | None,
    n_bytes: int,
    n_ctx_most: int,
    *,
    n_embd: int,
    n_head: int,
    type_k: str = DEFAULT_CACHE_TYPE,
    type_v: str | None = None,
    flash_attn: bool,
    n_ubatch: int = DEFAULT_N_UBATCH,
    n_sequences: int = 1,
    whole: bool = True,
) -> tuple[int, int]:
    """The largest context of each sequence, a multiple of 1024 tokens or `n_ctx_most`, that fits into `n_bytes` at its peak; at least
    1024, so that a message may be tried.

    Args:
        spec: which layers stream.
        n_ctx_most: what the model was trained for, in tokens.
        n_embd: elements of a hidden state.
        n_head: attention heads of the layer that has most.
        n_sequences: each has a cache of its own, and one of them at a time reads a long prompt.
        whole: prompts come as a whole; else in batches, for which all streaming layers hold all of a prompt.

    Returns:
        the context's size, and how many bytes are left for what streaming layers take while they read a prompt: at least what one
        that fills it takes, if it fits.
    """

    types: dict[str, Any] = {"type_k": type_k, "type_v": type_v, "n_ubatch": n_ubatch, "flash_attn": flash_attn}

    def left(n_ctx: int) -> int:
        """Bytes that are left for prompts."""
        kv = kv_memory(shape, spec, n_ctx * n_sequences, n_seq_max=n_sequences, **types)
        # what attends to what, in f32 and as it is used; without flash attention each head's weights
        mask = n_ctx * n_ubatch * (4 + (2 if flash_attn else 4 * n_head))
        return n_bytes - kv.total - mask

    def need(n_ctx: int) -> int:
        prompt = prompt_memory(shape, spec, n_ctx, n_embd=n_embd, **types)
        return min(prompt.whole + n_ctx * _BATCH_TOKEN, prompt.batches) if whole else prompt.batches

    def fits(n_ctx: int) -> bool:
        return need(n_ctx) <= left(n_ctx)

    if fits(n_ctx_most):
        return n_ctx_most, left(n_ctx_most)
    low, high = 1, max(1, n_ctx_most // SMALLEST_CONTEXT)  # in steps; low is taken whether or not it fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(SMALLEST_CONTEXT * middle) else (low, middle)
    n_ctx = min(n_ctx_most, SMALLEST_CONTEXT * low)
    return n_ctx, max(left(n_ctx), need(n_ctx))
