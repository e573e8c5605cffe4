"""Hybrid GGUF models on a patched llama.cpp: lazy attention layers keep only sinks and a window of the KV cache.

    from lt_gguf import Llama
    llm = Llama("model.gguf", n_ctx=32768)

Importing this package points llama-cpp-python at the patched libraries; `import llama_cpp` afterwards uses them too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lt_gguf.runtime.library import LibraryError, use_our_libraries

if TYPE_CHECKING:
    from lt_gguf.analysis.choose import choose_streaming
    from lt_gguf.chat.opening import open_documents
    from lt_gguf.runtime.disk_cache import LlamaDiskCache
    from lt_gguf.runtime.llama import Llama
    from lt_gguf.spec import AutoSpec, StreamingSpec

__all__ = ["AutoSpec", "LibraryError", "Llama", "LlamaDiskCache", "StreamingSpec", "choose_streaming", "open_documents"]

# Imported when first asked for: describing a file must not load the native library.
_HOME = {
    "AutoSpec": "lt_gguf.spec",
    "Llama": "lt_gguf.runtime.llama",
    "LlamaDiskCache": "lt_gguf.runtime.disk_cache",
    "StreamingSpec": "lt_gguf.spec",
    "choose_streaming": "lt_gguf.analysis.choose",
    "open_documents": "lt_gguf.chat.opening",
}

use_our_libraries()


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
