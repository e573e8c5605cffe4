"""Layers whose KV cache stays in 16 bits where that of the others is quantized (`cache_keep`), added to whatever says what streams.

Few layers are in such a list, those that 4 bits would break: keys of Qwen2.5-Coder-1.5B's layer 0, for example, are a hundred times as
long as those of the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from lt_gguf.spec.auto import AutoSpec
from lt_gguf.spec.fields import CACHE_KEEP, bad_value, check_integer
from lt_gguf.spec.layers import format_layers, parse_layers
from lt_gguf.spec.streaming import ENVIRONMENT_VARIABLE, StreamingSpec

Layers = str | Iterable[int]


def with_cache_keep(
    streaming: StreamingSpec | AutoSpec | str | None, layers: Layers | None
) -> StreamingSpec | AutoSpec | str | None:
    """The same streaming layers, and these ones kept in 16 bits, in place of those that it names itself.

    Args:
        streaming: as `lt_gguf.Llama` takes it; `None`: what the file and the environment variable LT_STREAMING say.
        layers: their numbers, or a text as in `0,2-3`, `all` or `none`; `None`: nothing changes.

    Raises:
        ValueError: these are no layers; whether the model has them is asked where it is loaded, or by a `StreamingSpec`.
    """
    if layers is None:
        return streaming
    text = layers if isinstance(layers, str) else _text_of(layers)
    if isinstance(streaming, StreamingSpec):
        return replace(streaming, cache_keep=parse_layers(text, streaming.n_layer, CACHE_KEEP))
    items = [item for item in _said(streaming).split(";") if item.strip() and not _is_cache_keep(item)]
    return ";".join([*items, f"{CACHE_KEEP}={text.strip() or 'none'}"])


def says_cache_keep(streaming: StreamingSpec | AutoSpec | str | None) -> bool:
    """Whether it says itself which layers are kept in 16 bits; `None`: whether the environment variable LT_STREAMING does."""
    return any(_is_cache_keep(item) for item in _said(streaming).split(";"))


def _said(streaming: StreamingSpec | AutoSpec | str | None) -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, "") if streaming is None else str(streaming)


def _is_cache_keep(item: str) -> bool:
    return item.partition("=")[0].strip() == CACHE_KEEP


def _text_of(layers: Iterable[int]) -> str:
    if not isinstance(layers, Iterable):
        bad_value(CACHE_KEEP, repr(layers), 'numbers of layers, or a text as in "0,2-3"')
    return format_layers(check_integer(CACHE_KEEP, il, 0) for il in layers) or "none"
