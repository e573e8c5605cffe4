"""Which types a context's KV cache gets: those that are asked for, else those that the file recommends, else f16."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lt_gguf.gguf.file import GGUFModel, read_model
from lt_gguf.gguf.header import read_header
from lt_gguf.runtime.context_size import known_spec
from lt_gguf.spec import ENVIRONMENT_VARIABLE, AutoSpec, CacheTypes, StreamingSpec, with_cache_keep
from lt_gguf.spec.cache_keep import Layers, says_cache_keep
from lt_gguf.spec.cache_types import CACHE_TYPES, DEFAULT_CACHE_TYPE, PLAIN, cache_type
from lt_gguf.spec.fields import is_auto
from lt_gguf.spec.keys import cache_prefix

Streaming = StreamingSpec | AutoSpec | str | None


class CacheTypeWarning(RuntimeWarning):
    """The KV cache has other types than were asked for or recommended, or such as break the model."""


@dataclass(frozen=True)
class CacheChoice:
    """What a context is made with.

    Args:
        types: of K and V in the layers with full attention.
        streaming: what streams, as it was asked for, with the layers that stay in 16 bits.
        flash_attn: whether flash attention is used; `None`: as it is where nobody says.
        notes: what who asked has to know, a line each.
    """

    types: CacheTypes
    streaming: Streaming
    flash_attn: bool | None
    notes: tuple[str, ...] = ()


def choose_cache(
    described: GGUFModel | None,
    streaming: Streaming,
    types: CacheTypes | None = None,
    cache_keep: Layers | None = None,
    flash_attn: bool | None = None,
) -> CacheChoice:
    """The types of a context's cache.

    The recommended types hold while all layers stream that the file lets stream: others would be quantized that weren't when the types
    were measured. The recommended layers stay in 16 bits beside any type that is quantized.

    Args:
        described: the model, `None` if its file recommends nothing.
        streaming: what streams, as `Llama` takes it, but for `"auto"`.
        types: those that are asked for; `None`: none are.
        cache_keep: the layers that are to stay in 16 bits, as `with_cache_keep` takes them; `None`: nobody says.
        flash_attn: whether it is on; `None`: nobody says, and it is switched on where a recommended type of V needs it.

    Raises:
        ValueError: `cache_keep` are no layers.
    """
    found = None if described is None else described.recommended
    streams = described is not None and _streams_as_recommended(described, streaming)
    notes = []
    if types is not None:
        chosen = types
    elif described is None or found is None or not streams:
        chosen = PLAIN
    else:
        chosen = found.types
        if cache_type(chosen.v).block > 1:
            if flash_attn is not None and not flash_attn:
                notes.append(f"V of the KV cache is {PLAIN.v}, not {chosen.v} as the file recommends: that needs flash attention")
                chosen = CacheTypes(chosen.k, PLAIN.v)
            else:
                flash_attn = True
    keep = cache_keep
    if keep is None and found is not None and found.keep and chosen.is_quantized and not says_cache_keep(streaming):
        keep = found.keep
    streaming = with_cache_keep(streaming, keep)
    if described is not None and found is not None:
        warning = found.warning(chosen, _kept(described, streaming), streams)
        notes += [] if warning is None else [warning]
    return CacheChoice(chosen, streaming, flash_attn, tuple(notes))


def recommending(file: str | os.PathLike[str]) -> GGUFModel | None:
    """The description of a model whose file recommends types of the cache, `None` if it recommends none, or can't be read: that is
    said where it is loaded.

    Raises:
        ValueError: what it recommends is malformed, or of a newer version.
    """
    try:
        metadata = read_header(file).metadata
        prefix = cache_prefix(str(metadata["general.architecture"].value))
    except (ValueError, OSError, KeyError):
        return None
    return read_model(file) if any(key.startswith(prefix) for key in metadata) else None


def types_of(type_k: int | None, type_v: int | None) -> CacheTypes | None:
    """The types that `llama_cpp.Llama` is asked for by ggml's numbers, `None` if it isn't. One that is left out, or isn't a type of a
    cache, which is said where it is loaded, is f16."""
    if type_k is None and type_v is None:
        return None
    names = {found.ggml_type: name for name, found in CACHE_TYPES.items()}
    return CacheTypes(
        *(DEFAULT_CACHE_TYPE if number is None else names.get(number, DEFAULT_CACHE_TYPE) for number in (type_k, type_v))
    )


def _streams_as_recommended(described: GGUFModel, streaming: Streaming) -> bool:
    """Whether all layers stream that the file lets stream."""
    streams = set(described.spec.layers) if described.spec is not None else set()
    said = os.environ.get(ENVIRONMENT_VARIABLE) if streaming is None else streaming
    if isinstance(said, AutoSpec) or (isinstance(said, str) and is_auto(said)):
        return not streams
    spec = known_spec(described, streaming)
    return streams <= (set() if spec is None else set(spec.layers))


def _kept(described: GGUFModel, streaming: Streaming) -> tuple[int, ...]:
    spec = known_spec(described, streaming, whole=False)
    return () if spec is None else spec.cache_keep
