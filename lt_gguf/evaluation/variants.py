"""A way to run a file that is compared with others: what streams, and, where that differs too, the type of the KV cache.

As a text, which names it in records: a spec, or a spec, @ and a type, as in `off@q4_0`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lt_gguf.spec.cache_types import cache_type

_MARK = "@"


def variant(spec: str, type_: str | None) -> str:
    """The text for a spec with a type of the KV cache, `None`: with that of all others. Raises ValueError: there is no such type."""
    if type_ is None:
        return spec
    cache_type(type_)
    return f"{spec}{_MARK}{type_}"


def split_variant(text: str) -> tuple[str, str | None]:
    """The spec and the type of a variant's text."""
    spec, _, type_ = text.partition(_MARK)
    return spec, type_ or None


def variants(specs: Sequence[str], types: Iterable[str]) -> list[str]:
    """The specs, and all of them again with each type. Raises ValueError: there is no such type."""
    return [*specs, *(variant(spec, type_) for type_ in types for spec in specs)]
