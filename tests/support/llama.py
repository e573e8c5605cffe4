"""`lt_gguf.Llama` in the modes that matter, and what a fresh context that was fed the same is like."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.tiny_checkpoint import N_VOCAB

import lt_gguf

# f32 keys and values, so that little but the order of additions differs; and cells for a small part of the prompts
SETTINGS = {"n_ctx": 2048, "n_batch": 64, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
SETTINGS |= {"type_k": 0, "type_v": 0}
SPECS = {"prefill_stream": "layers=1,3;prefill=stream", "prefill_full": "layers=1,3;prefill=full", "auto": "auto:0.5"}
SPECS["by_layer"] = SPECS["prefill_full"]  # prompts come in one batch; in the mode before it in batches of 64

all_modes = pytest.mark.parametrize("mode", SPECS)
modes_in_batches = pytest.mark.parametrize("mode", [mode for mode in SPECS if mode != "by_layer"])


def load(path, mode: str = "prefill_stream", **settings) -> lt_gguf.Llama:
    llm = lt_gguf.Llama(str(path), **(SETTINGS | {"streaming": SPECS[mode]} | settings))
    llm._reads_by_layer &= mode == "by_layer"
    return llm


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, N_VOCAB, n).tolist()


def logits(llm: lt_gguf.Llama) -> np.ndarray:
    """Those that the next token is sampled from."""
    return np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (N_VOCAB,)).copy()


def answer(llm: lt_gguf.Llama, prompt: list[int], n: int = 12, **options) -> list[int]:
    """Generates n tokens; all but the last one are then in the context."""
    return list(itertools.islice(llm.generate(prompt, temp=0, **options), n))


def read_prompt(llm: lt_gguf.Llama, tokens: list[int]) -> None:
    """Reads tokens as a prompt, also where it is a single one."""
    answer(llm, tokens, 1, reset=False)


def fed(path, mode: str, history: list[tuple[str, list[int]]], **settings) -> lt_gguf.Llama:
    """A fresh context that has read `history`: prompts, and tokens that are decoded one by one."""
    llm = load(path, mode, snapshot_limit=0, **settings)
    for kind, tokens in history:
        if kind == "prompt":
            read_prompt(llm, tokens)
        else:
            for token in tokens:
                llm.eval([token])
    return llm


def assert_like(llm: lt_gguf.Llama, path, mode: str, history: list[tuple[str, list[int]]]) -> None:
    fresh = fed(path, mode, history)
    assert llm._input_ids.tolist() == fresh._input_ids.tolist() == [token for _, part in history for token in part]
    np.testing.assert_allclose(logits(llm), logits(fresh), atol=2e-4)


def n_read(llm: lt_gguf.Llama, action) -> int:
    """Number of tokens that are computed."""
    before = llm.n_read + llm.n_decoded
    action()
    return llm.n_read + llm.n_decoded - before


def interrupt(monkeypatch, llm, at: int, when: str) -> None:
    """Lets the at-th llama_decode from now on end with Ctrl-C, before or after the work was done."""
    calls = itertools.count()

    def decode(batch):
        if next(calls) != at:
            return type(llm._ctx).decode(llm._ctx, batch)
        monkeypatch.undo()
        if when == "after":
            type(llm._ctx).decode(llm._ctx, batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._ctx, "decode", decode)
