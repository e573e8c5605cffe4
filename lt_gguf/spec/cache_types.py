"""The types that a KV cache can have, and which those of streaming layers and of layers that are kept in 16 bits have."""

from __future__ import annotations

from typing import NamedTuple


class CacheType(NamedTuple):
    """A type that llama.cpp takes for a KV cache: its number in ggml.h, elements and bytes of a block."""

    ggml_type: int
    block: int
    block_bytes: int


CACHE_TYPES = {
    "f32": CacheType(0, 1, 4),
    "f16": CacheType(1, 1, 2),
    "bf16": CacheType(30, 1, 2),
    "q8_0": CacheType(8, 32, 34),
    "q4_0": CacheType(2, 32, 18),
    "q4_1": CacheType(3, 32, 20),
    "iq4_nl": CacheType(20, 32, 18),
    "q5_0": CacheType(6, 32, 22),
    "q5_1": CacheType(7, 32, 24),
}
DEFAULT_CACHE_TYPE = "f16"


def cache_type(name: str) -> CacheType:
    """The type of that name. Raises ValueError if llama.cpp takes no such type for a KV cache."""
    if name not in CACHE_TYPES:
        raise ValueError(f'cache type = "{name}": must be one of {", ".join(CACHE_TYPES)}')
    return CACHE_TYPES[name]


def streaming_cache_type(full: str, streaming: str | None = None) -> str:
    """The type of K or V in streaming layers (as `lt_type_streaming()` of the runtime says it).

    Args:
        full: that of the other layers.
        streaming: what a spec asks for; `None`: that of the other layers where it isn't quantized, else f16. What streams doesn't
            grow, so there is little to gain by quantizing it.

    Raises:
        ValueError: llama.cpp takes no such type for a KV cache.
    """
    if streaming is not None:
        cache_type(streaming)
        return streaming
    return kept_cache_type(full)


def kept_cache_type(other: str) -> str:
    """The type of K or V in a layer that isn't quantized, where other layers have the type `other`: that one, or f16.

    Raises:
        ValueError: llama.cpp takes no such type for a KV cache.
    """
    return other if cache_type(other).block == 1 else DEFAULT_CACHE_TYPE
