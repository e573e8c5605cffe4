"""Contexts of one model in threads of their own: what one computes is not seen in another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from support.native import Model, Token
from support.oracle import Subject, random_tokens

SPECS = [
    "layers=1,3;sink=4;window=40;prefill=full",
    "layers=0,2;sink=2;window=60;prefill=stream",
    "auto=0.5;sink=4;window=40;w_last=16",
    "off",
]
N_PROMPT, N_ANSWER, N_TURNS = 400, 20, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return Subject.build("llama", 4, tmp_path_factory.mktemp("threads")).native


def talk(context, seed: int) -> np.ndarray:
    """Logits of a conversation: prompts longer than the spare cells, answers, and the last message edited twice."""
    rows, n_past = [], 0
    for turn in range(N_TURNS):
        for edit in range(1 + 2 * (turn == N_TURNS - 1)):
            if edit and not context.seq_rm(0, n_past - N_PROMPT - N_ANSWER, -1):
                context.seq_rm(0, -1, -1)
                n_past = N_PROMPT + N_ANSWER
            n_past -= (N_PROMPT + N_ANSWER) * bool(edit)
            prompt = random_tokens(N_PROMPT, seed=100 * seed + 10 * turn + edit)
            rows.append(context.decode_batch(Token(int(t), n_past + i, (0,), i == N_PROMPT - 1) for i, t in enumerate(prompt)))
            n_past += N_PROMPT
            rows.append(context.decode_one_by_one(random_tokens(N_ANSWER, seed=seed), n_past))
            n_past += N_ANSWER
    return np.concatenate(rows)


def test_a_spec_is_of_the_contexts_that_a_thread_makes(model):
    """Between the choice of a spec and the context that is made with it, other threads choose theirs."""
    chosen = Barrier(len(SPECS))

    def make(spec: str) -> str:
        model.set_streaming(spec)
        chosen.wait(timeout=60)
        with model.context(n_ctx=512) as context:
            return context.streaming()

    with ThreadPoolExecutor(len(SPECS)) as pool:
        made = list(pool.map(make, SPECS))
    for spec, text in zip(SPECS, made):
        assert text.startswith(spec.split(";")[0]), made
    assert model.streaming() == "off"  # here nothing was chosen


@pytest.mark.slow
def test_contexts_side_by_side(model):
    """Each of eight conversations in its own thread gives the bits that it gives alone."""
    contexts = []
    for i in range(2 * len(SPECS)):
        model.set_streaming(SPECS[i % len(SPECS)])
        # note: one thread each, because llama.cpp's threads wait for each other without giving their cores away
        contexts.append(model.context(n_ctx=2048, n_batch=512, n_ubatch=64, n_threads=1))
    model.set_streaming(None)
    try:
        alone = [talk(context, i) for i, context in enumerate(contexts)]
        for context in contexts:
            context.clear()
        with ThreadPoolExecutor(len(contexts)) as pool:
            together = list(pool.map(talk, contexts, range(len(contexts))))
    finally:
        for context in contexts:
            context.close()
    for i, (one, other) in enumerate(zip(alone, together)):
        assert np.array_equal(one, other), SPECS[i % len(SPECS)]
