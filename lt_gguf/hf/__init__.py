"""The torch side of lt-gguf: what needs transformers.

    from lt_gguf.hf import apply_streaming
    apply_streaming(model, StreamingSpec.parse("layers=1,3;window=1020;prefill=stream", n_layer))

Other rooms import it where they need it and not before: the package is used without torch, too.
"""

from __future__ import annotations

from typing import Any

__all__ = ["apply_streaming", "remove_streaming"]


def __getattr__(name: str) -> Any:
    # note: imported when first asked for: the analysis needs none of it
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lt_gguf.hf import streaming_attention

    return getattr(streaming_attention, name)
