"""Reading ahead, keeping and restoring: the logits are those of a context that read all of the prompt at once."""

from __future__ import annotations

import itertools
import os
import signal

import llama_cpp
import numpy as np
import pytest
from support.llama import all_modes, answer, assert_like, interrupt, load, logits, n_read, text
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

from lt_gguf import LlamaDiskCache
from lt_gguf.gguf.fingerprint import content_hash
from lt_gguf.runtime.kept_states import KeptStates
from lt_gguf.runtime.state_store import StateStore

DOCUMENT, QUESTION, OTHER = text(600), text(30, 1), text(40, 2)


@pytest.fixture
def store(tmp_path) -> StateStore:
    return StateStore(tmp_path / "states")


@all_modes
def test_a_prompt_that_was_begun_ahead_is_one_prompt(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    steps = []
    llm.read_ahead(DOCUMENT, lambda *step: steps.append(step))
    assert steps[0] == (64, 600) and steps[-1] == (600, 600) and llm.n_tokens == 600
    assert n_read(llm, lambda: llm.read_ahead(DOCUMENT[:500])) == 0  # it begins so
    assert llm.n_reusable(DOCUMENT + QUESTION) == 600
    assert n_read(llm, lambda: answer(llm, DOCUMENT + QUESTION, 1)) in (30, 46)  # auto: the queries that it chooses by, once more
    assert_like(llm, hybrid_file, mode, [("prompt", DOCUMENT + QUESTION)])


@all_modes
def test_read_again_from_disk_in_another_context(hybrid_file, mode, store):
    """Two questions about one document, each as if it had been asked in the message with the document."""
    llm = load(hybrid_file, mode)
    llm.read_ahead(DOCUMENT)
    assert KeptStates(llm, store).keep("a document")
    answer(llm, DOCUMENT + QUESTION, 20)
    for other in (llm, load(hybrid_file, mode), load(hybrid_file, mode, n_ctx=1024)):
        kept = KeptStates(other, store)
        n = kept.restore(DOCUMENT + OTHER)
        assert n == (0 if other is llm and mode == "prefill_stream" else 600) or (other is llm and n < 600)
        assert n_read(other, lambda: answer(other, DOCUMENT + OTHER, 1)) <= 56
        assert_like(other, hybrid_file, mode, [("prompt", DOCUMENT + OTHER)])


@all_modes
def test_the_same_prompt_again_reads_nothing(hybrid_file, mode, store):
    """Its last token, too, whose logits come back with the state."""
    llm = load(hybrid_file, mode)
    said = answer(llm, DOCUMENT, 20)
    assert KeptStates(llm, store).keep()
    other = load(hybrid_file, mode)
    assert KeptStates(other, store).restore(DOCUMENT) == 600
    assert n_read(other, lambda: answer(other, DOCUMENT, 1)) == 0
    assert_like(other, hybrid_file, mode, [("prompt", DOCUMENT)])
    assert answer(other, DOCUMENT, 20) == said
    # and it goes on as ever: a question beside it, one after the answer
    assert answer(other, DOCUMENT + said[:10] + QUESTION, 1) and n_read(other, lambda: answer(other, DOCUMENT, 1)) == 0
    history = [("prompt", DOCUMENT), ("decoded", said[:10]), ("prompt", QUESTION)]
    answer(other, DOCUMENT, 11)
    answer(other, DOCUMENT + said[:10] + QUESTION, 1)
    assert_like(other, hybrid_file, mode, history)


def test_without_streaming_layers_the_context_can_be_cut(hybrid_file, store):
    llm = load(hybrid_file, streaming="off")
    llm.read_ahead(DOCUMENT)
    kept = KeptStates(llm, store)
    assert kept.keep()
    answer(llm, DOCUMENT + QUESTION, 20)
    assert kept.restore(DOCUMENT + OTHER) == 0  # it is there
    fresh = load(hybrid_file, streaming="off")
    assert KeptStates(fresh, store).restore(DOCUMENT[:300] + OTHER) == 300
    assert n_read(fresh, lambda: answer(fresh, DOCUMENT[:300] + OTHER, 1)) == 40


@all_modes
def test_a_conversation_goes_on_in_another_process(hybrid_file, mode, store):
    llm = load(hybrid_file, mode)
    said = answer(llm, DOCUMENT + QUESTION, 20)
    KeptStates(llm, store).keep()
    prompt = DOCUMENT + QUESTION + said + OTHER
    other = load(hybrid_file, mode)
    assert KeptStates(other, store).restore(prompt) == 649  # nobody has computed the last token of the answer
    assert n_read(other, lambda: answer(other, prompt, 1)) == 41
    np.testing.assert_allclose(logits(other), logits_after(llm, prompt), atol=2e-4)


def logits_after(llm, prompt: list[int]) -> np.ndarray:
    answer(llm, prompt, 1)
    return logits(llm)


def test_states_of_another_context_are_not_taken(hybrid_file, store, tmp_path):
    """Another spec, other types of the cache, another model: nothing is found."""
    llm = load(hybrid_file, streaming="layers=1")
    llm.read_ahead(DOCUMENT)
    KeptStates(llm, store).keep()
    changed = tmp_path / "changed.gguf"
    data = bytearray(hybrid_file.read_bytes())
    data[-5] ^= 1  # a weight
    changed.write_bytes(data)
    copied = tmp_path / "copied.gguf"
    copied.write_bytes(hybrid_file.read_bytes())
    others = [(hybrid_file, {"streaming": "layers=2"}), (hybrid_file, {"streaming": "layers=1", "type_k": 1})]
    others += [(changed, {"streaming": "layers=1"}), (hybrid_file, {"streaming": "layers=1", "rope_freq_base": 5000.0})]
    for file, settings in others:
        assert KeptStates(load(file, **settings), store).restore(DOCUMENT + QUESTION) == 0
    assert KeptStates(load(copied, streaming="layers=1"), store).restore(DOCUMENT + QUESTION) == 600


def test_a_state_that_llama_cpp_refuses_is_read_anew(hybrid_file, store):
    """Its checksum is right, and what it holds is of something else."""
    llm = load(hybrid_file, streaming="off")
    llm.read_ahead(DOCUMENT)
    kept = KeptStates(llm, store)
    kept.keep()
    entry = store.entries()[0]
    with store.opened(entry) as (header, parts):
        fields, state = dict(header.fields), bytes(parts["state"])
    store.put(kept.identity, DOCUMENT, fields, {"state": state[:1000] + bytes(len(state) - 1000)})
    fresh = load(hybrid_file, streaming="off")
    KeptStates(fresh, store).restore(DOCUMENT + QUESTION)
    assert store.entries() == [] and len(store.take_noticed()) == 1
    answer(fresh, DOCUMENT + QUESTION, 1)
    assert_like_off(fresh, hybrid_file, DOCUMENT + QUESTION)


def assert_like_off(llm, file, prompt: list[int]) -> None:
    other = load(file, streaming="off")
    answer(other, prompt, 1)
    np.testing.assert_allclose(logits(llm), logits(other), atol=2e-4)


@all_modes
@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_while_reading_ahead(hybrid_file, monkeypatch, mode, when):
    llm = load(hybrid_file, mode)
    interrupt(monkeypatch, llm, 3, when)
    with pytest.raises(KeyboardInterrupt):
        llm.read_ahead(DOCUMENT)
    assert llm.n_tokens == 192
    llm.read_ahead(DOCUMENT)
    answer(llm, DOCUMENT + QUESTION, 1)
    assert_like(llm, hybrid_file, mode, [("prompt", DOCUMENT + QUESTION)])


def test_ctrl_c_aborts_the_batch_at_hand(hybrid_file, monkeypatch):
    """It is a signal while llama.cpp computes: no batch ends before it is noticed."""
    llm = load(hybrid_file, "prefill_full", n_batch=1024, n_ubatch=1024)
    decode = type(llm._ctx).decode
    calls = itertools.count()

    def interrupted(batch):
        next(calls)
        os.kill(os.getpid(), signal.SIGINT)
        return decode(llm._ctx, batch)

    monkeypatch.setattr(llm._ctx, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.read_ahead(DOCUMENT)
    assert next(calls) == 1 and llm.n_tokens == 0
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    llm.read_ahead(DOCUMENT)
    answer(llm, DOCUMENT + QUESTION, 1)
    assert_like(llm, hybrid_file, "prefill_full", [("prompt", DOCUMENT + QUESTION)])


def test_what_does_not_fit_is_refused_before_it_is_read(hybrid_file):
    llm = load(hybrid_file, n_ctx=512)
    with pytest.raises(ValueError, match="600 tokens don't fit a context of 512"):
        llm.read_ahead(DOCUMENT)
    assert llm.n_tokens == llm.n_read == 0


@pytest.mark.parametrize("own", [True, False], ids=["ours", "llama_cpp's"])
def test_llama_disk_cache(hybrid_file, tmp_path, own):
    """Of both classes the states lie in our store, and what was read for one prompt is found for the next, in another process, too."""
    folder = tmp_path / "cache"

    def with_cache(**settings):
        llm = load(hybrid_file, "prefill_full", **settings)
        llm.set_cache(LlamaDiskCache(folder) if own else llama_cpp.LlamaDiskCache(str(folder)))
        return llm

    llm = with_cache()
    llm.create_completion(DOCUMENT, max_tokens=8, temperature=0)
    assert llm.cache.cache_size > 0 and len(llm.cache.store.entries()) == 1
    assert not any(b"pickle" in path.read_bytes()[:200] for path in folder.rglob("*.state"))
    other = with_cache()
    assert DOCUMENT + QUESTION in other.cache
    assert n_read(other, lambda: other.create_completion(DOCUMENT + QUESTION, max_tokens=1, temperature=0)) == 30
    third = load(hybrid_file, "prefill_stream")
    third.set_cache(LlamaDiskCache(folder))
    assert DOCUMENT not in third.cache
    with pytest.raises(RuntimeError, match=r"belongs to no model yet, give it to Llama\.set_cache first"):
        LlamaDiskCache(folder)[DOCUMENT]


def test_a_hash_is_of_all_bytes_and_remembered(tmp_path):
    path, notes = tmp_path / "a.gguf", tmp_path / "notes"
    path.write_bytes(b"x" * 100)
    first = content_hash(path, notes)
    assert content_hash(path) == content_hash(path, notes) == first and len(list(notes.iterdir())) == 1
    path.write_bytes(b"x" * 99 + b"y")
    assert content_hash(path, notes) != first
    parts = [tmp_path / f"m-{i:05}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(b"part")
    whole = content_hash(parts[0])
    parts[1].write_bytes(b"other")
    assert content_hash(parts[0]) != whole
