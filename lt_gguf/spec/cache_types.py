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
DEFAULT_CACHE_TYPE = "f16"  # of K and V where nobody says another


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


class CacheTypes(NamedTuple):
    """The types of K and V in the layers whose cache grows. As a text: `q8_0`, or `q8_0/q4_0` where they differ."""

    k: str
    v: str

    @classmethod
    def parse(cls, text: str) -> CacheTypes:
        """Reads `q8_0` or `q8_0/q4_0`. Raises ValueError: it is neither, or llama.cpp takes no such type for a KV cache."""
        names = [name.strip() for name in text.split("/")]
        if len(names) > 2:
            raise ValueError(f'cache type = "{text}": must be one type, or those of K and of V, as in q8_0/q4_0')
        for name in names:
            cache_type(name)
        return cls(names[0], names[-1])

    def __str__(self) -> str:
        return self.k if self.k == self.v else f"{self.k}/{self.v}"

    @property
    def said(self) -> str:
        """`q8_0`, or `K q8_0, V q4_0`, as in a sentence."""
        return self.k if self.k == self.v else f"K {self.k}, V {self.v}"

    @property
    def is_quantized(self) -> bool:
        """Whether that of K or that of V has less than 16 bits."""
        return any(cache_type(name).block > 1 for name in self)

    @property
    def needs_flash_attn(self) -> bool:
        """llama.cpp reads a quantized V in flash attention only."""
        return cache_type(self.v).block > 1


PLAIN = CacheTypes(DEFAULT_CACHE_TYPE, DEFAULT_CACHE_TYPE)


def parse_cache_types(text: str) -> tuple[CacheTypes, ...]:
    """Reads `q8_0,q8_0/q4_0`: types of K and V, or of both. Raises ValueError: that isn't one."""
    found = dict.fromkeys(CacheTypes.parse(part) for part in text.split(",") if part.strip())
    return tuple(types for types in found if types != PLAIN)  # note: that is measured anyway
