"""The C API of the patch (`ggml-patch/src/lt.h`), bound by ctypes on the library that llama-cpp-python loads.

Importing this module loads the native library and raises `LibraryError` if it is missing or doesn't fit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from lt_gguf.runtime.library import load_llama_cpp

_llama_cpp = load_llama_cpp().llama_cpp
_MODEL = _llama_cpp.llama_model_p_ctypes
_CONTEXT = _llama_cpp.llama_context_p_ctypes
_TEXT = ctypes.POINTER(ctypes.c_char)

_ERROR_SIZE = 1024  # a line; longer ones are cut


class KVPart(IntEnum):
    """A part of the KV cache: the layers with full attention, or the streaming ones."""

    FULL = 0
    STREAMING = 1


def _bind(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(_llama_cpp._lib, name)
    function.restype = result
    function.argtypes = arguments
    return function


_lt_model_spec = _bind("lt_model_spec", ctypes.c_int32, _MODEL, _TEXT, ctypes.c_size_t)
_lt_model_set_spec = _bind("lt_model_set_spec", ctypes.c_bool, _MODEL, ctypes.c_char_p, _TEXT, ctypes.c_size_t)
_lt_context_spec = _bind("lt_context_spec", ctypes.c_int32, _CONTEXT, _TEXT, ctypes.c_size_t)
_lt_kv_bytes = _bind("lt_kv_bytes", ctypes.c_size_t, _CONTEXT, ctypes.c_int)
_lt_kv_cells = _bind("lt_kv_cells", ctypes.c_uint32, _CONTEXT, ctypes.c_int)
_lt_seq_positions = _bind(
    "lt_seq_positions",
    ctypes.c_int32,
    _CONTEXT,
    ctypes.c_int,
    _llama_cpp.llama_seq_id,
    ctypes.POINTER(_llama_cpp.llama_pos),
    ctypes.c_int32,
)


def model_spec(model: int) -> str:
    """The canonical text of the spec that the contexts made from `model` from now on use, `off` if no layer streams."""
    return _text(_lt_model_spec, model)


def set_model_spec(model: int, spec: str | None) -> None:
    """Overrides that spec; `None` goes back to what the file and LT_STREAMING say. Contexts that exist keep theirs.

    Raises:
        ValueError: the spec is malformed, or the model can't stream; nothing has changed.
    """
    error = ctypes.create_string_buffer(_ERROR_SIZE)
    if not _lt_model_set_spec(model, None if spec is None else spec.encode(), error, _ERROR_SIZE):
        raise ValueError(error.value.decode(errors="replace"))


def context_spec(context: int) -> str:
    """The canonical text of the spec that `context` runs with."""
    return _text(_lt_context_spec, context)


def kv_bytes(context: int, part: KVPart) -> int:
    """Bytes allocated for K and V in a part of the cache."""
    return _lt_kv_bytes(context, part)


def kv_cells(context: int, part: KVPart) -> int:
    """Cells that a part has for each sequence, or for all together in a unified cache."""
    return _lt_kv_cells(context, part)


def seq_positions(context: int, part: KVPart, seq_id: int) -> list[int] | None:
    """The positions of a sequence that a part holds, ascending; `None` if there is no such sequence or no plain KV cache."""
    n = _lt_seq_positions(context, part, seq_id, None, 0)
    if n < 0:
        return None
    positions = (_llama_cpp.llama_pos * n)()
    n = min(n, _lt_seq_positions(context, part, seq_id, positions, n))
    return positions[:n]


def _text(function: Callable[..., int], handle: int) -> str:
    size = function(handle, None, 0) + 1
    buffer = ctypes.create_string_buffer(size)
    function(handle, buffer, size)
    return buffer.value.decode()
