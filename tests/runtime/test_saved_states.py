"""Saved states of `lt_gguf.Llama`: they hold the prompts, and can be gone back from."""

from __future__ import annotations

import pickle

import llama_cpp
import pytest
from support.llama import all_modes, answer, assert_like, load, n_read, text
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

import lt_gguf  # noqa: F401 - before llama_cpp, to which it shows the libraries


@all_modes
def test_a_saved_state_knows_its_prompts(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    prompt, decoded = text(600), text(300, 1)
    llm.eval(prompt)
    for token in decoded:
        llm.eval([token])
    state = llm.save_state()
    for other in (llm, load(hybrid_file, mode), load(hybrid_file, mode, n_ctx=1024)):
        other.load_state(state)
        other.n_tokens = 650
        other.eval(text(20, 2))
        assert_like(other, hybrid_file, mode, [("prompt", prompt), ("decode", decoded[:50]), ("prompt", text(20, 2))])


@all_modes
def test_states_in_llama_cpps_cache(hybrid_file, mode):
    """llama-cpp-python restores a state from its cache where more of a prompt is in there than in the context."""
    llm = load(hybrid_file, mode)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    first, second, more = text(400), text(400, 1), text(30, 2)
    for prompt in (first, second):
        llm.create_completion(prompt, max_tokens=8, temperature=0)
    n_read = llm.n_read
    llm.create_completion(first + more, max_tokens=1, temperature=0)
    assert llm.n_read - n_read == 30  # the cached answer was cut off
    assert_like(llm, hybrid_file, mode, [("prompt", first), ("prompt", more)])


@all_modes
def test_a_saved_state_can_be_gone_back_from(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    first, second, edited = text(600), text(300, 1), text(40, 2)
    said = answer(llm, first)
    answer(llm, first + said + second, 50)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    other = load(hybrid_file, mode)
    other.load_state(state)
    assert n_read(other, lambda: answer(other, first + said + edited, 1)) == 41
    assert_like(other, hybrid_file, mode, [("prompt", first), ("decode", said[:-1]), ("prompt", said[-1:] + edited)])


@pytest.mark.parametrize("settings", [{"n_batch": 128}, {"n_batch": 32, "n_ctx": 1024}], ids=str)
def test_a_state_in_a_context_with_other_batches(hybrid_file, settings):
    llm = load(hybrid_file)
    llm.eval(text(600))
    other = load(hybrid_file, **settings)
    other.load_state(llm.save_state())
    other.eval([7])
    assert_like(other, hybrid_file, "prefill_stream", [("prompt", text(600)), ("decode", [7])])


@all_modes
def test_a_state_of_llama_cpps_own_class(hybrid_file, mode):
    """It doesn't say what was a prompt: going back far takes it all for one."""
    llm = load(hybrid_file, mode)
    llm.eval(text(900))
    state = llm.save_state()
    del state.lt_gguf
    llm.load_state(state)
    llm.n_tokens = 400
    llm.eval(text(20, 2))
    assert_like(llm, hybrid_file, mode, [("prompt", text(900)[:400] + text(20, 2))])
