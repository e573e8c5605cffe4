"""What a saved state of a `Llama` holds beside llama.cpp's own bytes, and how these are taken."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

from lt_gguf.runtime.library import load_llama_cpp
from lt_gguf.runtime.prompts import Prompts
from lt_gguf.runtime.snapshots import Snapshot

_llama_cpp = load_llama_cpp().llama_cpp


@dataclass(frozen=True)
class Saved:
    """What a saved state needs to be gone back from.

    Args:
        prompts: what was read as a prompt.
        snapshots: to which the streaming layers can go back.
        broken_at: position from which on the memory isn't to be relied on, `None` if all of it is.
        streams: there are streaming layers, or will be: it can be cut at its snapshots only.
    """

    prompts: Prompts
    snapshots: list[Snapshot] = field(default_factory=list)
    broken_at: int | None = None
    streams: bool = True


def state_bytes(context: Any) -> bytearray:
    """What llama.cpp saves of a whole context, once in memory. Raises RuntimeError: it can't be saved."""
    size = _llama_cpp.llama_state_get_size(context)
    data = bytearray(size)
    n_bytes = _llama_cpp.llama_state_get_data(context, (ctypes.c_uint8 * size).from_buffer(data), size)
    if not 0 < n_bytes <= size:
        raise RuntimeError("llama.cpp can't save this context's state")
    return data if n_bytes == size else data[:n_bytes]
