"""Which contexts compute attention with our kernel (its results: tests/runtime/test_attention.py)."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import pytest
from support.native import C
from support.oracle import random_tokens


def decoded(model, spec) -> np.ndarray:
    """The logits of tokens that are decoded one by one."""
    tokens = random_tokens(90)
    with model.context(spec, n_ctx=512, n_ubatch=64, kv="f16", flash=True) as context:
        context.read_prompt(tokens[:80])
        return context.decode_one_by_one(tokens[80:], 80)


@pytest.mark.parametrize("streams", [True, False])
def test_who_computes_with_it(subject, monkeypatch, streams):
    """Contexts with streaming layers, and where lt_gguf asks for it all; the variable decides before that."""
    model = subject("llama")
    spec = model.spec(4, 60, [1, 2], prefill="full") if streams else None
    results = {}
    for text in ("on", "off"):
        monkeypatch.setenv("LT_ATTENTION", text)
        results[text] = decoded(model, spec)
    assert not np.array_equal(results["on"], results["off"])
    monkeypatch.delenv("LT_ATTENTION")
    set_attention = C.llama_cpp._lib.lt_set_attention
    try:
        for for_all in (False, True):
            set_attention(ctypes.c_bool(for_all))
            assert np.array_equal(decoded(model, spec), results["on" if streams or for_all else "off"])
    finally:
        set_attention(ctypes.c_bool("lt_gguf.runtime.api" in sys.modules))


def test_another_word_in_the_variable_is_an_error(subject, monkeypatch):
    monkeypatch.setenv("LT_ATTENTION", "maybe")
    with pytest.raises(ValueError, match="LT_ATTENTION = maybe: must be on or off"):
        decoded(subject("llama"), None)
