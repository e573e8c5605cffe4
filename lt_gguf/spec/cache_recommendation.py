"""What a file recommends for its model's KV cache: types that were measured to lose nothing, and those that break the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lt_gguf.spec.cache_types import CACHE_TYPES, PLAIN, CacheTypes
from lt_gguf.spec.fields import bad_value, check_integer
from lt_gguf.spec.keys import CACHE_VERSION, Typed, cache_prefix
from lt_gguf.spec.layers import format_layers
from lt_gguf.spec.streaming import StreamingSpec

_ONE_OF = f"one of {', '.join(CACHE_TYPES)}"
_SOME_OF = "an array of strings, each the types of K and V as in q4_0 or q8_0/q4_0"


@dataclass(frozen=True)
class CacheRecommendation:
    """What somebody found out about the cache of a model, for who runs it and asks for no types.

    Args:
        n_layer: number of layers of the model (prediction heads included, as in the file's `block_count`).
        types: of K and V in the layers with full attention; streaming layers have what a spec says.
        keep: indices of layers that stay in 16 bits where these, or other types that somebody asks for, are quantized; kept sorted
            and unique.
        breaks: types with which the model is of no use where all its layers have full attention and none is kept.

    Raises:
        ValueError: there is no such type or layer.
    """

    n_layer: int
    types: CacheTypes = PLAIN
    keep: tuple[int, ...] = ()
    breaks: tuple[CacheTypes, ...] = ()

    def __post_init__(self) -> None:
        for types in (self.types, *self.breaks):
            CacheTypes.parse(str(types))
        layers = {check_integer("keep", il, 0, self.n_layer - 1) for il in self.keep}
        object.__setattr__(self, "keep", tuple(sorted(layers)))
        object.__setattr__(self, "breaks", tuple(dict.fromkeys(self.breaks)))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Typed], arch: str, n_layer: int) -> CacheRecommendation | None:
        """What a GGUF file's metadata recommend, `None` if they recommend nothing.

        Raises:
            ValueError: a key is missing or wrong, or a newer version of lt-gguf wrote them; the message names the key, its value and
                what is allowed.
        """
        prefix = cache_prefix(arch)
        if not any(key.startswith(prefix) for key in metadata):
            return None
        version = _read(metadata, f"{prefix}version", "uint32", f"the uint32 {CACHE_VERSION}")
        if version > CACHE_VERSION:
            raise ValueError(
                f"{prefix}version = {version}: is of a newer lt-gguf, this one knows {CACHE_VERSION}: update it, or remove what the file "
                "recommends for the cache: lt-gguf flag --no-cache-types"
            )
        if version < CACHE_VERSION:
            bad_value(f"{prefix}version", str(version), f"the uint32 {CACHE_VERSION}")
        k, v = (_read(metadata, f"{prefix}{name}", "string", _ONE_OF) for name in ("type_k", "type_v"))
        for name, type_ in (("type_k", k), ("type_v", v)):
            if type_ not in CACHE_TYPES:
                bad_value(f"{prefix}{name}", f'"{type_}"', _ONE_OF)
        keep = _flags(metadata, f"{prefix}keep", n_layer)
        breaks = _pairs(metadata, f"{prefix}breaks")
        return cls(n_layer, CacheTypes(k, v), keep, breaks)

    def to_metadata(self, arch: str) -> dict[str, Typed]:
        """The GGUF metadata that say it, in the order in which they are written; a list that is empty is left out."""
        prefix = cache_prefix(arch)
        metadata = {
            f"{prefix}version": Typed("uint32", CACHE_VERSION),
            f"{prefix}type_k": Typed("string", self.types.k),
            f"{prefix}type_v": Typed("string", self.types.v),
        }
        if self.keep:
            metadata[f"{prefix}keep"] = Typed("array of bool", [il in self.keep for il in range(self.n_layer)])
        if self.breaks:
            metadata[f"{prefix}breaks"] = Typed("array of string", [str(types) for types in self.breaks])
        return metadata

    @classmethod
    def changed(
        cls, base: CacheRecommendation | None, n_layer: int, types: str | None, keep: tuple[int, ...] | None, breaks: str | None
    ) -> CacheRecommendation | None:
        """What `base` recommends with other types, layers in 16 bits or types that break the model; `None` leaves each as it is.

        Args:
            types: as `CacheTypes.parse` reads them.
            breaks: several of these with commas between them, or `none`.

        Raises:
            ValueError: there is no such type.
        """
        asked: dict[str, Any] = {}
        if types is not None:
            asked["types"] = CacheTypes.parse(types)
        if keep is not None:
            asked["keep"] = keep
        if breaks is not None:
            names = [] if breaks.strip() == "none" else breaks.split(",")
            asked["breaks"] = tuple(CacheTypes.parse(name.strip()) for name in names)
        return replace(base or cls(n_layer), **asked) if asked else base

    def check(self, spec: StreamingSpec | None) -> None:
        """Raises ValueError if it recommends what breaks the model, for a file in which no layer streams.

        Where the layers that resist stream, or are kept, the others may well have types that break the model without.
        """
        if self.types in self.breaks and not self.keep and not (spec and spec.layers):
            raise ValueError(f"cache type = {self.types}: is recommended and breaks the model, must not be both")

    def warning(self, types: CacheTypes, keep: Sequence[int], streams: bool) -> str | None:
        """What somebody has to know who runs the model with a cache of these types; `None`: nothing.

        Only what is recommended is known to do where `breaks` has its types.

        Args:
            keep: the layers that are in 16 bits.
            streams: all layers stream that the file lets stream.
        """
        is_recommended = types == self.types and set(self.keep) <= set(keep) and streams
        if types not in self.breaks or is_recommended:
            return None
        return f"a KV cache of type {types} breaks this model, says its file, which recommends {self.said}"

    @property
    def said(self) -> str:
        """`K q8_0, V q4_0, f16 in layer 0`."""
        if not self.keep:
            return self.types.said
        return f"{self.types.said}, 16 bits in layer{'s' if len(self.keep) > 1 else ''} {format_layers(self.keep)}"

    def __str__(self) -> str:
        """One line with all of it."""
        breaks = f"; {' and '.join(map(str, self.breaks))} break{'s' if len(self.breaks) == 1 else ''} the model"
        return self.said + (breaks if self.breaks else "")


def _read(metadata: Mapping[str, Typed], key: str, type_: str, allowed: str) -> Any:
    found = metadata.get(key)
    if found is None:
        raise ValueError(f"{key}: is missing, must be {allowed} in a file that recommends types of the cache")
    if found.type != type_:
        value = "" if found.type.startswith("array") else f"{found.value} "
        bad_value(key, f"{value}({found.type})", allowed)
    return found.value


def _flags(metadata: Mapping[str, Typed], key: str, n_layer: int) -> tuple[int, ...]:
    if key not in metadata:
        return ()
    allowed = f"an array of bool, one for each of the {n_layer} layers"
    flags = _read(metadata, key, "array of bool", allowed)
    if flags is None or len(flags) != n_layer:
        bad_value(key, f"[array of {'many' if flags is None else len(flags)} bool]", allowed)
    return tuple(il for il, flag in enumerate(flags) if flag)


def _pairs(metadata: Mapping[str, Typed], key: str) -> tuple[CacheTypes, ...]:
    if key not in metadata:
        return ()
    texts = _read(metadata, key, "array of string", _SOME_OF)
    if texts is None:
        bad_value(key, "[array of many strings]", _SOME_OF)
    try:
        return tuple(CacheTypes.parse(text) for text in texts)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
