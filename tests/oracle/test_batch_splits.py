"""The result doesn't depend on how a prompt is split into batches and micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from support.oracle import EXACT, difference, random_tokens

SINK, WINDOW = 5, 40
SPLITS = [  # sizes of llama_decode calls (the last one repeats), n_ubatch
    ((1,), 1),
    ((7,), 7),
    ((40,), 40),
    ((41,), 16),
    ((300,), 300),
    ((300,), 39),
    ((300,), 41),
    ((300,), 1),
    ((3, 150, 1, 1, 90, 2, 60), 64),
    ((100, 1), 512),
]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "smollm3", "stablelm"])
@pytest.mark.parametrize("calls, n_ubatch", SPLITS)
def test_every_split_gives_the_same(subject, measured, family, calls, n_ubatch):
    model = subject(family)
    tokens = random_tokens(330)
    spec = model.spec(SINK, WINDOW)
    rows, start = [], 0
    with model.context(spec, n_ctx=512, n_ubatch=n_ubatch) as context:
        for size in list(calls) + [calls[-1]] * len(tokens):
            if start < len(tokens):
                rows.append(context.decode(tokens[start : start + size], start))
                start += size
    measured(family, "batch splits", difference(np.concatenate(rows), model.expected(tokens, spec)), EXACT)


@pytest.mark.parametrize("asked_for", ["every", "last"])
def test_logits_asked_for_only_at_the_end_are_the_same(subject, asked_for):
    """Where few tokens ask for logits the last layer computes few of them: positions and rows no longer coincide."""
    from support.native import Token

    model = subject("llama")
    tokens = random_tokens(330)
    spec = model.spec(SINK, WINDOW, layers=range(1, model.n_layer))
    wanted = [i % 50 == 49 if asked_for == "every" else i == 329 for i in range(330)]
    with model.context(spec, n_ctx=512, n_ubatch=64) as context:
        computed = context.decode_batch(Token(int(t), i, logits=w) for i, (t, w) in enumerate(zip(tokens, wanted)))
    assert difference(computed, model.expected(tokens, spec)[wanted]) <= EXACT
