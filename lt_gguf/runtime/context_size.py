"""How large a context can be: as large as the model was trained for and memory allows (`n_ctx="auto"`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lt_gguf.gguf.file import GGUFModel, read_model
from lt_gguf.memory.budget import SMALLEST_CONTEXT, largest_context
from lt_gguf.memory.kv import DEFAULT_N_UBATCH, KVShape
from lt_gguf.runtime.available_memory import available_memory
from lt_gguf.spec import AutoSpec, StreamingSpec
from lt_gguf.spec.cache_types import CACHE_TYPES
from lt_gguf.spec.fields import is_auto

AUTO = "auto"

_UNKNOWN = 4096  # tokens, of a model that doesn't say what it was trained for

# bytes for what is computed (of a vocabulary of 152,000 tokens the logits of a micro-batch are 300 MiB), and for who else runs here
_RESERVE = 768 << 20


@dataclass(frozen=True)
class ContextSize:
    """A context that fits: its size, and what is left for the prompts that it reads.

    Args:
        n_ctx: tokens.
        prompt_limit: bytes, 0: nobody knows.
    """

    n_ctx: int
    prompt_limit: int

    @property
    def can_be_less(self) -> bool:
        return self.n_ctx > SMALLEST_CONTEXT

    def halved(self) -> ContextSize:
        """For where less can be had than this computer says, as on a GPU."""
        return ContextSize(max(SMALLEST_CONTEXT, self.n_ctx // 2), self.prompt_limit)


def largest_size(
    file: str | os.PathLike[str],
    streaming: StreamingSpec | AutoSpec | str | None,
    *,
    type_k: int | None = None,
    type_v: int | None = None,
    flash_attn: bool = False,
    n_ubatch: int = DEFAULT_N_UBATCH,
    n_sequences: int = 1,
    whole: bool = True,
) -> ContextSize:
    """The largest context of a model file, that of each sequence where there are several.

    Args:
        streaming: as `Llama` takes it, but for `"auto"`.
        type_k: of the cache, ggml's number; `None`: f16.
        type_v: as `type_k`.
        whole: prompts come as a whole, and the model can read them layer by layer.

    Raises:
        ValueError: it isn't a GGUF model, or can't have such a cache.
        OSError: it can't be read.
    """
    described = read_model(file)
    most = described.n_ctx_train or _UNKNOWN
    available = available_memory()
    if available is None:
        return ContextSize(most, 0)
    # note: the weights are mapped and must stay in memory
    left = available - described.n_bytes - max(_RESERVE, available // 10)
    spec = known_spec(described, streaming, whole)
    # note: an upper bound for the models whose cache is of another shape. without streaming layers, llama.cpp gives layers with a sliding
    #       window of their own all of the context
    layers = described.n_head_kv[: described.n_layer_main]
    shape = KVShape(layers, max(described.n_head_kv, default=0), described.head_size_k, described.head_size_v)
    if described.own_window and spec is not None and spec.layers:
        shape = described.kv_shape
    types: dict[str, Any] = {"type_k": _type_name(type_k), "type_v": _type_name(type_v), "n_ubatch": n_ubatch}
    model: dict[str, Any] = {"n_embd": described.n_embd, "n_head": max(described.n_head, default=0)}
    n_ctx, prompt_limit = largest_context(
        shape, spec, left, most, **model, **types, flash_attn=flash_attn, n_sequences=n_sequences, whole=whole
    )
    return ContextSize(n_ctx, prompt_limit if spec is not None and spec.prefill == "full" else 0)


def known_spec(described: GGUFModel, streaming: StreamingSpec | AutoSpec | str | None, whole: bool = True) -> StreamingSpec | None:
    """Which layers stream, `None` if none does. Where they are chosen for the prompt, a spec that saves no more than theirs:
    read as a `whole`, no more layers than stay full and one are there at a time, read in batches, all."""
    streaming = os.environ.get("LT_STREAMING") or None if streaming is None else streaming
    if streaming is None or isinstance(streaming, StreamingSpec):
        return described.spec if streaming is None else streaming
    try:
        if isinstance(streaming, AutoSpec) or is_auto(streaming):
            auto = streaming if isinstance(streaming, AutoSpec) else AutoSpec.parse(streaming, described.spec)
            by_saving = sorted(described.may_stream, key=lambda layer: described.n_head_kv[layer])
            layers = tuple(sorted(by_saving[: auto.n_streaming(len(by_saving))])) if whole else ()
            found = StreamingSpec(layers, described.n_layer, auto.sink, auto.window, "full", cache_keep=auto.cache_keep)
            return found if layers or auto.cache_keep else None
        return described.parse_spec(streaming)
    except ValueError:
        return None  # note: loading the model says what is wrong with it


def _type_name(ggml_type: int | None) -> str:
    return next((name for name, type_ in CACHE_TYPES.items() if type_.ggml_type == ggml_type), "f16")
