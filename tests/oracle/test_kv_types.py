"""Flash attention and smaller KV types: a hybrid's error is of the size of the full model's own.

The reference is transformers in float32 for both; the same weights, tokens and settings. With flash attention llama.cpp
casts f32 KV to f16.
"""

from __future__ import annotations

import pytest
from support.families import FAMILIES
from support.oracle import RELATIVE, difference, random_tokens

SETTINGS = [("f32", True), ("f16", False), ("f16", True), ("bf16", False), ("bf16", True), ("q8_0", True), ("q4_0", True)]
SHAPES = [(4, 60), (0, 33), (40, 100)]
ALWAYS = ["llama", "smollm3"]  # with and without RoPE


def cases():
    for number, family in enumerate(FAMILIES):
        for index, (kv, flash) in enumerate(SETTINGS):
            for shape in SHAPES:
                usual = shape == SHAPES[(number + index) % 3] and (family in ALWAYS or index % 4 == number % 4)
                yield pytest.param(family, kv, flash, *shape, marks=() if usual else pytest.mark.full)


@pytest.mark.slow
@pytest.mark.parametrize("family, kv, flash, sink, window", list(cases()))
def test_error_is_that_of_the_full_model(subject, measured, family, kv, flash, sink, window):
    model = subject(family)
    n_prompt, tokens = 300, random_tokens(400)
    spec = model.spec(sink, window)
    settings = dict(n_prompt=n_prompt, n_ctx=512, n_ubatch=50, kv=kv, flash=flash)
    full = difference(model.computed(tokens, None, **settings), model.expected(tokens, None))
    hybrid = difference(model.computed(tokens, spec, **settings), model.expected(tokens, spec))
    setting = f"{kv} KV, flash attention" if flash else f"{kv} KV"
    measured(family, setting, hybrid, RELATIVE * full, full=full, spec=str(spec))
