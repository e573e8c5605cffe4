"""What users do, on a real model: one question after the other about a text, second thoughts, layers chosen for a prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.questions import EXPECTED, KEEPS_NAMES, QUESTION

from lt_gguf import Llama

SINK, WINDOW = 4, 252  # less than the text, so that streaming layers forget its beginning
OTHER = "Who are the people in these stories?"


def load(file, streaming: str, **settings) -> Llama:
    return Llama(str(file), streaming=streaming, n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False, **settings)


@pytest.fixture(scope="module")
def narrow(report) -> str:
    """The report's layers with a window that is smaller than the text."""
    return str(replace(report.spec, window=WINDOW))


def ask(llm: Llama, messages: list[dict], question: str, n: int = 24) -> str:
    """The answer; the question and it are added to the messages."""
    messages.append({"role": "user", "content": question})
    reply = llm.create_chat_completion(messages, max_tokens=n, temperature=0)["choices"][0]["message"]["content"]
    messages.append({"role": "assistant", "content": reply})
    return reply


def n_read(llm: Llama, call) -> tuple[int, str]:
    before = llm.n_read
    return (lambda answer: (llm.n_read - before, answer))(call())


def test_a_conversation_about_a_text(hybrid, document):
    """The full model finds what is asked for, in its first message and in a later one, and so does a hybrid with the right half;
    without any full layer it is gone, so it is far back indeed."""
    found = {}
    for streaming in ("off", f"layers={KEEPS_NAMES};sink={SINK};window={WINDOW}", f"layers=all;sink={SINK};window={WINDOW}"):
        llm, messages = load(hybrid, streaming), []
        ask(llm, messages, f"{document}\n\n{OTHER}")
        found[streaming] = EXPECTED in ask(llm, messages, QUESTION)
        llm.close()
    assert list(found.values()) == [True, True, False], found


def test_the_cache_is_as_small_as_the_formula_says(hybrid, narrow, document, report):
    llm = load(hybrid, narrow)
    ask(llm, [], f"{document}\n\n{QUESTION}", n=4)
    full = load(hybrid, "off")
    share = len(report.spec.layers) / report.spec.n_layer
    kv, kv_full = llm.kv_bytes(), full.kv_bytes()["total"]
    assert kv["full"] == pytest.approx(kv_full * (1 - share))
    assert kv["streaming"] <= kv_full * share * 1024 / 2048  # sinks, window, a micro-batch and padding
    assert kv["prompt"] == 0


def test_second_thoughts_read_only_what_is_new(hybrid, narrow, document):
    llm, messages = load(hybrid, narrow), []
    first = ask(llm, messages, f"{document}\n\n{QUESTION}")
    again = messages[:1]
    read, regenerated = n_read(llm, lambda: llm.create_chat_completion(again, max_tokens=24, temperature=0))
    assert read == 0
    assert regenerated["choices"][0]["message"]["content"] == first
    ask(llm, messages, OTHER)
    read, edited = n_read(llm, lambda: ask(llm, messages[:2], QUESTION))
    assert 0 < read < 40
    fresh = load(hybrid, narrow)
    told = []
    assert ask(fresh, told, f"{document}\n\n{QUESTION}") == first
    assert ask(fresh, told, QUESTION) == edited


def test_layers_chosen_for_the_prompt(hybrid, document):
    llm = load(hybrid, f"auto:0.5;sink={SINK};window={WINDOW}")
    tokens = llm.tokenize(document.encode())
    ratios = llm.lazy_ratios(tokens, sink=SINK, window=WINDOW, w_last=16, lazy="min")
    full = load(hybrid, "off").kv_bytes()["total"]
    assert llm.streaming is None and llm.kv_bytes()["total"] < full
    llm.eval(tokens)
    assert llm.streaming is not None
    assert set(llm.streaming.layers) == set(np.argsort(ratios, kind="stable")[15:].tolist())
    assert llm.kv_bytes()["total"] < 0.7 * full


def test_the_vocabulary_alone(smollm2):
    """As scripts load a model whose tokens they only count."""
    llm = Llama(str(smollm2), vocab_only=True, verbose=False)
    assert llm.detokenize(llm.tokenize(b"Hello, world", add_bos=False)) == b"Hello, world"
    assert llm.streaming is None
