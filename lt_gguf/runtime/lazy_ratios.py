"""Lazy ratios of a prompt, measured in a context of their own."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lt_gguf.runtime import api, crash
from lt_gguf.runtime.library import load_llama_cpp
from lt_gguf.runtime.log import captured_errors
from lt_gguf.spec import AutoSpec

_binding = load_llama_cpp()
_llama_cpp = _binding.llama_cpp


def measure(
    model: int,
    parameters: Any,
    tokens: Sequence[int],
    spec: AutoSpec,
    lora: ctypes.c_void_p | None = None,
    lora_scale: float = 1.0,
    verbose: bool = False,
) -> np.ndarray:
    """Reads a prompt with full attention and returns each layer's lazy ratio.

    Args:
        model: handle of the model, whose spec is already `spec`.
        parameters: llama_context_params that the context is made with, but for its size and what serves embeddings.
        tokens: the prompt.
        lora: handle of a LoRA adapter that is applied with `lora_scale`.
        verbose: show llama.cpp's log.

    Returns:
        float32 (n_layer,)

    Raises:
        ValueError: the context can't be made; the message has llama.cpp's reason.
        RuntimeError: llama_decode failed.
    """
    n_batch = min(parameters.n_batch, len(tokens))
    settings = {"n_ctx": len(tokens), "n_batch": n_batch, "n_ubatch": min(parameters.n_ubatch, n_batch)}
    settings |= {"n_seq_max": 1, "embeddings": False}
    own = type(parameters).from_buffer_copy(parameters)
    for name, value in settings.items():
        setattr(own, name, value)
    doing = crash.step(f"measuring lazy ratios of a prompt of {len(tokens)} tokens")
    with captured_errors(forward=verbose) as log, doing, _context(model, own, log) as context:
        if lora is not None:
            adapters = (_llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora)
            _llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(lora_scale))
        _read(context, tokens, n_batch)
        ratios = api.lazy_ratios(context)
    if ratios is None:
        raise RuntimeError(f"the runtime measured no lazy ratios with {spec}")
    return np.asarray(ratios, dtype=np.float32)


@contextmanager
def _context(model: int, parameters: Any, log: Any) -> Iterator[int]:
    context = _llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise ValueError(log.reason or "no context for the lazy ratios can be made")
    try:
        yield context
    finally:
        _llama_cpp.llama_free(context)


def _read(context: int, tokens: Sequence[int], n_batch: int) -> None:
    api.prompt_begin(context, 0, len(tokens))
    batch = _binding._internals.LlamaBatch(n_tokens=n_batch, embd=0, n_seq_max=1, verbose=False)
    try:
        for begin in range(0, len(tokens), n_batch):
            part = list(tokens[begin : begin + n_batch])
            batch.set_batch(batch=part, n_past=begin, logits_all=False)
            batch.batch.logits[len(part) - 1] = begin + n_batch >= len(tokens)
            if code := _llama_cpp.llama_decode(context, batch.batch):
                raise RuntimeError(f"llama_decode returned {code}")
    finally:
        batch.close()
