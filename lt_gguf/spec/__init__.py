"""What streams: the spec of a hybrid model, as a text, as GGUF metadata and in a checkpoint's config.json.

Everything else in the package is built on this, so it imports nothing of it.
"""

from lt_gguf.spec.auto import DEFAULT_AUTO_W_LAST, MAX_W_LAST, AutoSpec, Lazy, parse_running, runtime_text
from lt_gguf.spec.cache_keep import with_cache_keep
from lt_gguf.spec.cache_recommendation import CacheRecommendation
from lt_gguf.spec.cache_types import CacheTypes
from lt_gguf.spec.keys import Typed
from lt_gguf.spec.layers import format_layers, parse_layers
from lt_gguf.spec.provenance import Provenance
from lt_gguf.spec.streaming import (
    DEFAULT_FRACTION,
    DEFAULT_PREFILL,
    DEFAULT_SINK,
    DEFAULT_W_LAST,
    DEFAULT_WINDOW,
    ENVIRONMENT_VARIABLE,
    PREFILL_MODES,
    StreamingSpec,
)

__all__ = [
    "DEFAULT_AUTO_W_LAST",
    "DEFAULT_FRACTION",
    "DEFAULT_PREFILL",
    "DEFAULT_SINK",
    "DEFAULT_WINDOW",
    "DEFAULT_W_LAST",
    "ENVIRONMENT_VARIABLE",
    "MAX_W_LAST",
    "PREFILL_MODES",
    "AutoSpec",
    "CacheRecommendation",
    "CacheTypes",
    "Lazy",
    "Provenance",
    "StreamingSpec",
    "Typed",
    "format_layers",
    "parse_layers",
    "parse_running",
    "runtime_text",
    "with_cache_keep",
]
