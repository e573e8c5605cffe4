"""Ctrl-C and aborted decodes: what was read stays, nothing stale is sampled, and the conversation goes on."""

from __future__ import annotations

import itertools

import llama_cpp
import numpy as np
import pytest
from support.llama import all_modes, answer, assert_like, interrupt, load, logits, modes_in_batches, n_read, text
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

import lt_gguf  # noqa: F401 - before llama_cpp, to which it shows the libraries


@pytest.mark.slow
@modes_in_batches
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_ctrl_c_while_a_prompt_is_read(hybrid_file, monkeypatch, mode, at, when):
    llm = load(hybrid_file, mode)
    first, second, third = text(600), text(400, 1), text(200, 2)
    llm.eval(first)
    interrupt(monkeypatch, llm, at, when)
    with pytest.raises(KeyboardInterrupt):
        llm.eval(second)
    assert llm.n_tokens == 600 + at * 64
    kept = second[: at * 64]
    llm.eval(third)
    assert_like(llm, hybrid_file, mode, [("prompt", first), ("prompt", kept + third)])


@pytest.mark.slow
@modes_in_batches
@pytest.mark.parametrize("at", [0, 2, 9, 10])
def test_ctrl_c_while_going_back(hybrid_file, monkeypatch, mode, at):
    llm = load(hybrid_file, mode, snapshot_limit=0)
    history = [("prompt", text(600)), ("decode", text(40, 1)), ("prompt", text(100, 2)), ("decode", text(300, 3))]
    for kind, tokens in history:
        if kind == "prompt":
            llm.eval(tokens)
        else:
            for token in tokens:
                llm.eval([token])
    llm.n_tokens = 700  # all must be read again: a batch of decoded tokens is the 11th
    interrupt(monkeypatch, llm, at, "after")
    with pytest.raises(KeyboardInterrupt):
        llm.eval(text(5, 4))
    assert llm.n_tokens == 700
    llm.eval([7])
    assert_like(llm, hybrid_file, mode, [*history[:2], ("prompt", history[2][1][:60] + [7])])


@all_modes
def test_an_aborted_decode(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    first, second = text(600), text(300, 1)
    llm.eval(first)
    answers = iter([False] * 40)
    callback = llama_cpp.ggml_abort_callback(lambda _: next(answers, True))
    llama_cpp.llama_set_abort_callback(llm.ctx, callback, None)
    with pytest.raises(RuntimeError, match="llama_decode returned 2"):
        llm.eval(second)
    n_kept = llm.n_tokens - 600
    assert 0 <= n_kept < 300
    llama_cpp.llama_set_abort_callback(llm.ctx, llama_cpp.ggml_abort_callback(), None)
    llm.eval(second[n_kept:])
    assert_like(llm, hybrid_file, mode, [("prompt", first), ("prompt", second)])


@all_modes
def test_after_ctrl_c_no_stale_logits_are_sampled(hybrid_file, monkeypatch, mode):
    llm = load(hybrid_file, mode)
    llm.eval(text(600))
    interrupt(monkeypatch, llm, 0, "after")
    with pytest.raises(KeyboardInterrupt):
        llm.eval(text(100, 1))
    assert answer(llm, text(600)) == answer(load(hybrid_file, mode), text(600))


@pytest.mark.slow
@modes_in_batches
@pytest.mark.parametrize("attribute", ["n_tokens", "_broken_at", "_logits_at", "n_read", "_requires_eval"])
def test_ctrl_c_between_a_decode_and_its_bookkeeping(hybrid_file, mode, attribute):
    """It strikes where the attribute is about to be set after the third or the fifth batch, which is the last one."""
    for n_sets in (1,) if attribute in ("_logits_at", "_requires_eval") else (3, 5):
        llm = load(hybrid_file, mode)
        llm.eval(text(600))
        counted = itertools.count(1)

        class Interrupted(type(llm)):
            def __setattr__(self, name, value):
                if name == attribute and self._broken_at is not None and self._is_decoded() and next(counted) == n_sets:
                    raise KeyboardInterrupt
                super().__setattr__(name, value)

            def _is_decoded(self):
                return llama_cpp.llama_memory_seq_pos_max(self._ctx.memory, 0) >= self._broken_at

        llm.__class__ = Interrupted
        with pytest.raises(KeyboardInterrupt):
            llm.eval(text(300, 1))
        n = llm.n_tokens
        assert n - 600 in (128, 192, 256, 300)
        llm.eval([7])
        kept = text(300, 1)[: n - 600]
        history = [("prompt", text(600)), ("prompt", kept), ("decode", [7])]
        if len(kept) < 300:
            history[1:] = [("prompt", kept + [7])]
        assert_like(llm, hybrid_file, mode, history)


@all_modes
def test_ctrl_c_while_a_state_is_restored(hybrid_file, monkeypatch, mode):
    llm = load(hybrid_file, mode)
    llm.eval(text(600))
    state = llm.save_state()
    llm.eval(text(500, 1))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_state_set_data", interrupted)
    llm.reset()
    llm.eval(text(700, 2))
    with pytest.raises(KeyboardInterrupt):
        llm.load_state(state)
    assert llm.n_tokens == 600
    llm.eval([7])
    assert llm.n_tokens == 601
    whole = load(hybrid_file, mode, snapshot_limit=0)
    for tokens in (text(600), [7]):
        whole.eval(tokens)
    np.testing.assert_allclose(logits(llm), logits(whole), atol=2e-4)


def test_ctrl_c_while_embedding(hybrid_file, monkeypatch):
    llm = load(hybrid_file, embedding=True, n_batch=32, n_ubatch=32, pooling_type=1)
    llm.eval(text(20))
    interrupt(monkeypatch, llm, 0, "after")
    with pytest.raises(KeyboardInterrupt):
        llm.embed("the quick brown fox")
    n_before = llm.n_read
    llm.eval([7])
    assert llm.n_read - n_before == 20  # what the embedding has replaced
    assert llm._input_ids.tolist() == [*text(20), 7]
    assert len(llm.embed("the quick brown fox")) == 64
    assert llm.n_tokens == 0
    assert n_read(llm, lambda: llm.eval([7])) == 1
