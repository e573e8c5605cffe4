"""What a long prompt takes besides the KV cache while streaming layers read it with full attention (`prefill = full`):
the sizes of `ggml-patch/src/lt-kv-cache-prompt.cpp` and `lt-kv-cache-layers.cpp`."""

from __future__ import annotations

from typing import NamedTuple

from lt_gguf.memory.kv import DEFAULT_N_UBATCH, KVShape, padded_cells, streaming_cells
from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.cache_types import DEFAULT_CACHE_TYPE


class PromptMemory(NamedTuple):
    """Bytes, given back when the prompt has been read.

    Args:
        whole: if it comes in one batch, and layers are read one after the other: of the largest streaming layer, and the hidden
            states of all tokens. What a model takes whose graph can't be cut between layers is `batches`.
        batches: if it comes in several batches, or beside other sequences: of all streaming layers.
    """

    whole: int
    batches: int


def prompt_memory(
    shape: KVShape,
    spec: StreamingSpec | None,
    n_tokens: int,
    *,
    n_embd: int,
    n_ctx: int | None = None,
    type_k: str = DEFAULT_CACHE_TYPE,
    type_v: str | None = None,
    n_ubatch: int = DEFAULT_N_UBATCH,
    flash_attn: bool = True,
) -> PromptMemory:
    """What the first prompt of a conversation takes, in a context of one sequence.

    Args:
        spec: which layers stream; `None` for an ordinary model, which takes nothing.
        n_tokens: of the prompt.
        n_embd: elements of a hidden state.
        n_ctx: context size in tokens, that of the prompt if not given.

    Raises:
        ValueError: an unknown cache type, or one that llama.cpp refuses for this model.
    """
    if spec is None or spec.prefill != "full" or n_tokens <= streaming_cells(spec, n_ctx or n_tokens, n_ubatch=n_ubatch):
        return PromptMemory(0, 0)
    layers = [
        shape.token_bytes(il, spec.cache_type(il, type_k), spec.cache_type(il, type_v or type_k), flash_attn)
        for il in range(len(shape.n_head_kv))
        if spec.is_streaming(il)
    ]
    if not layers:
        return PromptMemory(0, 0)
    n_cells = padded_cells(n_tokens)
    batches = sum(layers) * n_cells
    by_layer = max(layers) * n_cells + n_tokens * n_embd * 4
    # note: nor are models read layer by layer that have sliding windows of their own
    in_batches = len(layers) == 1 or bool(shape.own_layers)
    return PromptMemory(batches if in_batches else min(by_layer, batches), batches)
