"""The GGUF keys of the streaming spec, and the type of their values. (`ggml-patch/src/lt-model-specs.cpp` reads the same ones.)"""

from __future__ import annotations

from typing import Any, NamedTuple

VERSION_KEY = "lighttransfer.version"
SELECTION_KEY = "lighttransfer.selection"
LAZY_RATIO_KEY = "lighttransfer.lazy_ratio"
CALIBRATION_KEY = "lighttransfer.calibration"
FORMAT_VERSION = 1
CACHE_VERSION = 1  # of what a file recommends for the cache


class Typed(NamedTuple):
    """A GGUF metadata value and its type: `uint32`, `string`, `array of bool`, ..."""

    type: str
    value: Any


def layers_key(arch: str) -> str:
    return f"{arch}.attention.streaming.layers"


def sink_key(arch: str) -> str:
    return f"{arch}.attention.streaming.sink"


def window_key(arch: str) -> str:
    return f"{arch}.attention.streaming.window"


def prefill_key(arch: str) -> str:
    return f"{arch}.attention.streaming.prefill"


def streaming_keys(arch: str) -> tuple[str, str, str, str]:
    """The keys that make a file a hybrid one; a file has all of them or none."""
    return layers_key(arch), sink_key(arch), window_key(arch), prefill_key(arch)


def cache_prefix(arch: str) -> str:
    """What the keys begin with that recommend types of the KV cache, those of later versions too."""
    return f"{arch}.attention.cache."
