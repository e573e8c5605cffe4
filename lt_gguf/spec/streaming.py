"""Which layers stream and what they see: `StreamingSpec`, its text form and its GGUF keys. (`AutoSpec` leaves the layers open.)

A streaming layer lets the query at position q see the key at position p of the same sequence iff
`p <= q and (p < sink or q - p < window)` (LightTransfer, arXiv 2410.13846). The same rules, in the same words, are in
`ggml-patch/src/lt-spec.cpp`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from lt_gguf.spec.cache_types import CACHE_TYPES, kept_cache_type, streaming_cache_type
from lt_gguf.spec.fields import CACHE_KEEP, bad_value, check_fraction, check_integer, is_auto, parse_integer, split_fields
from lt_gguf.spec.keys import Typed, layers_key, prefill_key, sink_key, streaming_keys, window_key
from lt_gguf.spec.layers import bad_layers, format_layers, parse_layers

DEFAULT_SINK = 4
DEFAULT_WINDOW = 1020
PREFILL_MODES = ("full", "stream")
DEFAULT_PREFILL = "full"
DEFAULT_FRACTION = 0.5
DEFAULT_W_LAST = 32

# Environment variable that overrides the file's spec in every tool of the patched llama.cpp.
ENVIRONMENT_VARIABLE = "LT_STREAMING"


@dataclass(frozen=True)
class StreamingSpec:
    """Which layers of a model stream, and what a streaming layer sees.

    Args:
        layers: indices of the streaming layers, kept sorted and unique.
        n_layer: number of layers of the model (prediction heads included, as in the file's `block_count`).
        sink: number of first positions that stay visible.
        window: number of last positions that stay visible, the query's own included.
        prefill: `full`: a prompt is read with full attention in every layer, for models that weren't trained to stream;
            or `stream`.
        type: of these layers' KV cache when it runs, as in `f16` or `q8_0`; `None` for that of the other layers where it isn't
            quantized, else f16. It isn't part of a file.
        cache_keep: indices of layers, streaming or not, whose KV cache is f16 where it would be quantized, kept sorted and unique.
            They aren't part of a spec in a file either: that may recommend them (`CacheRecommendation`).

    Raises:
        ValueError: a field is out of range; the message names it and says what is allowed.
    """

    layers: tuple[int, ...]
    n_layer: int
    sink: int = DEFAULT_SINK
    window: int = DEFAULT_WINDOW
    prefill: str = DEFAULT_PREFILL
    type: str | None = None
    cache_keep: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n_layer = check_integer("n_layer", self.n_layer, 1)
        object.__setattr__(self, "n_layer", n_layer)
        object.__setattr__(self, "layers", _check_layers("layers", self.layers, n_layer))
        object.__setattr__(self, CACHE_KEEP, _check_layers(CACHE_KEEP, self.cache_keep, n_layer))
        object.__setattr__(self, "sink", check_integer("sink", self.sink, 0))
        object.__setattr__(self, "window", check_integer("window", self.window, 1))
        _check_prefill("prefill", self.prefill)
        if self.type is not None and self.type not in CACHE_TYPES:
            bad_value("type", f'"{self.type}"', f"one of {', '.join(CACHE_TYPES)}")

    @classmethod
    def off(cls, n_layer: int) -> StreamingSpec:
        """The spec of an ordinary model: no layer streams."""
        return cls((), n_layer)

    @classmethod
    def interleaved(
        cls,
        n_layer: int,
        fraction: float | Fraction = 0.5,
        sink: int = DEFAULT_SINK,
        window: int = DEFAULT_WINDOW,
        prefill: str = DEFAULT_PREFILL,
    ) -> StreamingSpec:
        """Streaming layers spread evenly: with `fraction` 0.5 the odd layers, with 0.25 layers 3, 7, 11, ...

        Raises:
            ValueError: `fraction` is not a number from 0 to 1.
        """
        share = check_fraction(fraction)
        # note: exact, so that a rounding error never costs a layer
        layers = (il for il in range(n_layer) if math.floor((il + 1) * share) > math.floor(il * share))
        return cls(tuple(layers), n_layer, sink, window, prefill)

    @classmethod
    def parse(cls, text: str, n_layer: int, base: StreamingSpec | None = None, may_stream: Iterable[int] = ()) -> StreamingSpec:
        """Reads `off` or `layers=1,3,5-9;sink=4;window=1020;prefill=stream;type=f16`, with or without `;cache_keep=0`.

        `layers` and `cache_keep` take numbers, ranges, `all` or `none`. Keys that are left out are taken from `base` (the file's
        spec), else from the defaults. A text of `cache_keep` alone leaves it to `base` what streams; without one nothing does.
        With `may_stream`, all layers are these.

        Raises:
            ValueError: the text is malformed, or neither it nor `base` names layers.
        """
        if text.strip() == "off":
            return cls.off(n_layer)

        head, _, rest = text.partition(";")
        is_off = head.strip() == "off"
        if is_off:
            base, text = cls.off(n_layer), rest

        if is_auto(text):
            raise ValueError(f'"{text}": chooses the layers while a prompt is read, must name them here, as in layers=1,3,5-9')
        example = "layers=1,3,5-9;sink=4;window=1020;prefill=stream"
        fields: dict[str, Any] = {}
        for key, value in split_fields(text, f'"off" or key=value pairs with ; between them, as in {example}').items():
            if is_off and key != CACHE_KEEP:
                raise ValueError(f"{key}: can't be given with off, where no layer streams")
            if key in ("layers", CACHE_KEEP):
                fields[key] = parse_layers(value, n_layer, key, may_stream if key == "layers" else ())
            elif key in ("sink", "window"):
                fields[key] = parse_integer(key, value)
            elif key in ("prefill", "type"):
                fields[key] = value
            else:
                raise ValueError(f"{key}: unknown key, must be one of layers, sink, window, prefill, type, cache_keep")

        if base is not None:
            return replace(base, n_layer=n_layer, **fields)
        if fields.keys() == {CACHE_KEEP}:
            fields["layers"] = ()
        if "layers" not in fields:
            raise ValueError(f'"{text}": says no layers and the file names none, add for example layers=1,3,5-9')
        return cls(n_layer=n_layer, **fields)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Typed], arch: str, n_layer: int) -> StreamingSpec | None:
        """The spec that a GGUF file's metadata holds, `None` if it is an ordinary file.

        Raises:
            ValueError: a key is missing or wrong; the message names the key, its value and what is allowed.
        """
        if not any(key in metadata for key in streaming_keys(arch)):
            return None

        layers_type = f"an array of bool, one for each of the {n_layer} layers"
        flags = _read(metadata, layers_key(arch), "array of bool", layers_type)
        if len(flags) != n_layer:
            bad_value(layers_key(arch), f"[array of {len(flags)} bool]", layers_type)
        sink = _read(metadata, sink_key(arch), "uint32", "an uint32 of at least 0")
        window = _read(metadata, window_key(arch), "uint32", "an uint32 of at least 1")
        prefill = _read(metadata, prefill_key(arch), "string", '"full" or "stream"')
        return cls(
            tuple(il for il, flag in enumerate(flags) if flag),
            n_layer,
            check_integer(sink_key(arch), sink, 0),
            check_integer(window_key(arch), window, 1),
            _check_prefill(prefill_key(arch), prefill),
        )

    def to_metadata(self, arch: str) -> dict[str, Typed]:
        """The GGUF metadata of this spec, in the order in which it is written.

        Raises:
            ValueError: it says something of the cache's types, which isn't part of it in a file.
        """
        if self.type is not None:
            raise ValueError(
                f"type = {self.type}: a file has no key for it, must be given when it runs (--streaming type={self.type})"
            )
        if self.cache_keep:
            keep = format_layers(self.cache_keep)
            raise ValueError(
                f"{CACHE_KEEP} = {keep}: a file's spec has no key for it, must be given when it runs or recommended (--cache-keep {keep})"
            )

        return {
            layers_key(arch): Typed("array of bool", [self.is_streaming(il) for il in range(self.n_layer)]),
            sink_key(arch): Typed("uint32", self.sink),
            window_key(arch): Typed("uint32", self.window),
            prefill_key(arch): Typed("string", self.prefill),
        }

    def is_streaming(self, il: int) -> bool:
        return il in self.layers

    def cache_type(self, il: int, full: str) -> str:
        """The type of K or V in layer `il`, where that of layers with full attention is `full`.

        Raises:
            ValueError: llama.cpp takes no such type for a KV cache.
        """
        found = streaming_cache_type(full, self.type) if self.is_streaming(il) else full
        return kept_cache_type(found) if il in self.cache_keep else found

    def without_streaming(self) -> StreamingSpec:
        """The spec of the full model beside it, with the same layers in 16 bits."""
        return replace(StreamingSpec.off(self.n_layer), cache_keep=self.cache_keep)

    def visible(self, q: int, p: int) -> bool:
        """True if the query at position `q` sees the key at position `p` in a streaming layer."""
        return p <= q and (p < self.sink or q - p < self.window)

    def __str__(self) -> str:
        """The canonical text: `off` if no layer streams, else all keys, `type` only if it is given; and `cache_keep` if there is any."""
        type_ = f";type={self.type}" if self.type else ""
        keep = f";{CACHE_KEEP}={format_layers(self.cache_keep)}" if self.cache_keep else ""
        return (self._text("layers") + type_ if self.layers else "off") + keep

    def hide_text(self) -> str:
        """The same for a context that only hides what these layers would drop, to measure with (`lt_context_hide` of the runtime)."""
        return self._text("hide")

    def _text(self, key: str) -> str:
        return f"{key}={format_layers(self.layers) or 'none'};sink={self.sink};window={self.window};prefill={self.prefill}"


def _check_layers(what: str, layers: Iterable[int], n_layer: int) -> tuple[int, ...]:
    checked = tuple(sorted({check_integer(what, il, None) for il in layers}))
    for il in checked:
        if not 0 <= il < n_layer:
            bad_layers(str(il), n_layer, what)
    return checked


def _check_prefill(what: str, value: Any) -> str:
    if value not in PREFILL_MODES:
        bad_value(what, f'"{value}"', '"full" or "stream"')
    return value


def _read(metadata: Mapping[str, Typed], key: str, type_: str, allowed: str) -> Any:
    found = metadata.get(key)
    if found is None:
        raise ValueError(f"{key}: is missing, must be {allowed} in a file with streaming layers")
    if found.type != type_:
        value = "" if found.type.startswith("array") else f"{found.value} "
        bad_value(key, f"{value}({found.type})", allowed)
    return found.value
