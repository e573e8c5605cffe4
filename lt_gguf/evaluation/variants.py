"""A way to run a file that is compared with others: what streams, and, where that differs too, the type of the KV cache.

As a text, which names it in records: a spec, or a spec, @ and the types of K and V, as in `off@q4_0` and `off@q8_0/q4_0`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lt_gguf.spec.cache_types import CacheTypes

_MARK = "@"


def split_variant(text: str) -> tuple[str, CacheTypes | None]:
    """The spec and the types of a variant's text; `None`: those of all others."""
    spec, _, types = text.partition(_MARK)
    return spec, CacheTypes.parse(types) if types else None


def variants(specs: Sequence[str], types: Iterable[CacheTypes]) -> list[str]:
    """The specs, and all of them again with each type."""
    return [*specs, *(f"{spec}{_MARK}{each}" for each in types for spec in specs)]
