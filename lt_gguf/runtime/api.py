"""The C API of the patch (`ggml-patch/src/lt.h`), bound by ctypes on the library that llama-cpp-python loads.

Importing this module loads the native library and raises `LibraryError` if it is missing or doesn't fit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NoReturn

from lt_gguf.runtime.library import LibraryError, load_llama_cpp
from lt_gguf.spec import StreamingSpec

_llama_cpp = load_llama_cpp().llama_cpp
_MODEL = _llama_cpp.llama_model_p_ctypes
_CONTEXT = _llama_cpp.llama_context_p_ctypes
_TEXT = ctypes.POINTER(ctypes.c_char)

# Spec of a context for `context_hide`; with all keys, so that it is the same whatever the file says.
HIDE_LATER = StreamingSpec.off(1).hide_text()
_ERROR_SIZE = 1024  # a line; longer ones are cut


class KVPart(IntEnum):
    """A part of the KV cache: the layers with full attention, the streaming ones, what the latter need besides while a long prompt
    is read with full attention, and, beside streaming layers, those with a sliding window of their own."""

    FULL = 0
    STREAMING = 1
    PROMPT = 2
    SWA = 3


def _bind(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(_llama_cpp._lib, name, None)
    if function is None:
        return _missing(name)
    function.restype = result
    function.argtypes = arguments
    return function


def _missing(name: str) -> Callable[..., Any]:
    def raise_error(*_: Any) -> NoReturn:
        raise LibraryError(f"{_llama_cpp._lib._name} is an older lt-gguf without {name}: install lt-gguf again")

    return raise_error


_lt_model_spec = _bind("lt_model_spec", ctypes.c_int32, _MODEL, _TEXT, ctypes.c_size_t)
_lt_model_set_spec = _bind("lt_model_set_spec", ctypes.c_bool, _MODEL, ctypes.c_char_p, _TEXT, ctypes.c_size_t)
_lt_model_may_stream = _bind("lt_model_may_stream", ctypes.c_int32, _MODEL, ctypes.POINTER(ctypes.c_bool), ctypes.c_int32)
_lt_context_spec = _bind("lt_context_spec", ctypes.c_int32, _CONTEXT, _TEXT, ctypes.c_size_t)
_lt_context_hide = _bind("lt_context_hide", ctypes.c_bool, _CONTEXT, ctypes.c_char_p, _TEXT, ctypes.c_size_t)
_lt_fill = _bind("lt_fill", ctypes.c_bool, _CONTEXT, _llama_cpp.llama_seq_id, ctypes.c_uint32, _TEXT, ctypes.c_size_t)
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
_lt_prompt_begin = _bind(
    "lt_prompt_begin", ctypes.c_bool, _CONTEXT, _llama_cpp.llama_seq_id, ctypes.c_uint32, _TEXT, ctypes.c_size_t
)
_lt_fits_by_layer = _bind("lt_fits_by_layer", ctypes.c_bool, _CONTEXT, _llama_cpp.llama_seq_id, ctypes.c_uint32)
_lt_set_prompt_limit = _bind("lt_set_prompt_limit", None, _CONTEXT, ctypes.c_size_t)
_PROGRESS = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_float, ctypes.c_void_p)
_lt_set_n_batch = _bind("lt_set_n_batch", None, _CONTEXT, ctypes.c_uint32)
_lt_set_progress = _bind("lt_set_progress", None, _CONTEXT, _PROGRESS, ctypes.c_void_p)
_lt_seq_in_prompt = _bind("lt_seq_in_prompt", ctypes.c_bool, _CONTEXT, _llama_cpp.llama_seq_id)
_lt_set_attention = _bind("lt_set_attention", None, ctypes.c_bool)
_lt_lazy_ratios = _bind("lt_lazy_ratios", ctypes.c_int32, _CONTEXT, ctypes.POINTER(ctypes.c_float), ctypes.c_int32)

# Here speed counts for models that don't stream, too, and nobody compares bits with stock llama.cpp.
_lt_set_attention(True)


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


def may_stream(model: int) -> tuple[int, ...]:
    """The layers of `model` that may stream."""
    layers = (ctypes.c_bool * _lt_model_may_stream(model, None, 0))()
    _lt_model_may_stream(model, layers, len(layers))
    return tuple(il for il, may in enumerate(layers) if may)


def context_spec(context: int) -> str:
    """The canonical text of the spec that `context` runs with."""
    return _text(_lt_context_spec, context)


def context_hide(context: int, spec: StreamingSpec) -> None:
    """What a context that was made with the spec `HIDE_LATER` hides from now on: tokens are computed as if these layers streamed.

    Its KV cache keeps everything, so a prompt that is read once with full attention serves for every spec with
    `prefill = full`: of each, tokens are decoded and then removed again.

    Raises:
        ValueError: the model can't stream so, or the context is another one; nothing has changed.
    """
    context_hide_text(context, spec.hide_text())


def context_hide_text(context: int, text: str) -> None:
    """The same with a spec's text, `hide=1,3,5-9;sink=4;window=1020;prefill=full`."""
    error = ctypes.create_string_buffer(_ERROR_SIZE)
    if not _lt_context_hide(context, text.encode(), error, _ERROR_SIZE):
        raise ValueError(error.value.decode(errors="replace"))


def fill(context: int, seq_id: int, n_tokens: int) -> None:
    """For measuring speed at a depth: appends tokens to a sequence as if they had been computed, without computing them.

    Cells are taken and dropped as when decoding; what is computed afterwards means nothing, how long it takes does.

    Raises:
        ValueError: they don't fit, or the context chooses its layers by a prompt; the sequence may have grown.
    """
    error = ctypes.create_string_buffer(_ERROR_SIZE)
    if not _lt_fill(context, seq_id, n_tokens, error, _ERROR_SIZE):
        raise ValueError(error.value.decode(errors="replace"))


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


def prompt_begin(context: int, seq_id: int, n_tokens: int) -> None:
    """Declares that the next `n_tokens` tokens of a sequence are one prompt, whatever logits they ask for.

    Raises:
        ValueError: it doesn't fit the prompt limit or the context; nothing has changed.
    """
    error = ctypes.create_string_buffer(_ERROR_SIZE)
    if not _lt_prompt_begin(context, seq_id, n_tokens, error, _ERROR_SIZE):
        raise ValueError(error.value.decode(errors="replace"))


def fits_by_layer(context: int, seq_id: int, n_tokens: int) -> bool:
    """Whether a prompt of so many tokens would be read layer by layer and fits the prompt limit, if it came in one batch."""
    return _lt_fits_by_layer(context, seq_id, n_tokens)


def set_prompt_limit(context: int, n_bytes: int) -> None:
    """Sets the most bytes that `KVPart.PROMPT` may take; 0: no limit."""
    _lt_set_prompt_limit(context, n_bytes)


def set_n_batch(context: int, n_batch: int) -> None:
    """Sets the most tokens of a batch. A prompt that comes in one is read layer by layer, where the model allows it."""
    _lt_set_n_batch(context, n_batch)


@contextmanager
def progress(context: int, report: Callable[[float], bool]) -> Iterator[None]:
    """Within the block `report` is called while a batch is computed, with the share of its work that is done; `False` ends it."""
    callback = _PROGRESS(lambda share, _: report(share))
    _lt_set_progress(context, callback, None)
    try:
        yield
    finally:
        _lt_set_progress(context, _PROGRESS(), None)


def seq_in_prompt(context: int, seq_id: int) -> bool:
    """True while a prompt of the sequence is being read."""
    return _lt_seq_in_prompt(context, seq_id)


def lazy_ratios(context: int) -> list[float] | None:
    """The lazy ratio of each layer, measured at the end of the context's first prompt; `None` before, or if its spec
    doesn't ask for it."""
    n = _lt_lazy_ratios(context, None, 0)
    if n <= 0:
        return None
    ratios = (ctypes.c_float * n)()
    return ratios[: min(n, _lt_lazy_ratios(context, ratios, n))]


def _text(function: Callable[..., int], handle: int) -> str:
    size = function(handle, None, 0) + 1
    buffer = ctypes.create_string_buffer(size)
    function(handle, buffer, size)
    return buffer.value.decode()
