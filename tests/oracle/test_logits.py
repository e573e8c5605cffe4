"""Float32, no flash attention: the runtime's logits are transformers' logits, for every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.families import FAMILIES
from support.oracle import EXACT, difference, random_tokens

# (sink, window) -> length of the prompt and number of tokens decoded one by one after it
SHAPES = {
    (4, 60): (300, 80),
    (0, 33): (200, 40),
    (0, 1): (120, 20),
    (7, 1): (120, 20),
    (1, 250): (700, 60),
    (129, 1025): (2400, 90),
}
ALWAYS = [(4, 60), (0, 1)]
ONE_FOR_EACH_FAMILY = [(129, 1025), (7, 1), (0, 33), (1, 250)]


def cases():
    for number, family in enumerate(FAMILIES):
        usual = ALWAYS + [ONE_FOR_EACH_FAMILY[number % len(ONE_FOR_EACH_FAMILY)]]
        for shape in SHAPES:
            for n_ubatch in (16, 64, 512):
                # by default every shape with the middle one, which is neither below nor above all windows
                marks = () if shape in usual and n_ubatch == 64 else pytest.mark.full
                yield pytest.param(family, *shape, n_ubatch, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("family, sink, window, n_ubatch", list(cases()))
def test_hybrid_model(subject, measured, family, sink, window, n_ubatch):
    model = subject(family)
    n_prompt, n_decoded = SHAPES[sink, window]
    tokens = random_tokens(n_prompt + n_decoded)
    spec = model.spec(sink, window, seed=n_ubatch)
    computed = model.computed(tokens, spec, n_prompt, n_ctx=len(tokens), n_ubatch=n_ubatch)
    expected = model.expected(tokens, spec)
    setting = f"sink {sink}, window {window}"
    measured(family, setting, difference(computed, expected), EXACT, n_ubatch=n_ubatch, spec=str(spec))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_full_model(subject, measured, family):
    """How far the model itself is off, at the greatest of the lengths: the bound on other devices is a multiple of it."""
    model, tokens = subject(family), random_tokens(2490)
    computed = model.computed(tokens, None, n_prompt=2400, n_ctx=len(tokens), n_ubatch=64)
    measured(family, "none streaming, 2,490 tokens", difference(computed, model.expected(tokens, None)), EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["none", "all"])
def test_no_layer_and_every_layer_streaming(subject, measured, family, layers):
    model = subject(family)
    tokens = random_tokens(360)
    spec = None if layers == "none" else model.spec(3, 50, range(model.n_layer))
    computed = model.computed(tokens, spec, n_prompt=330, n_ctx=512, n_ubatch=40)
    measured(family, f"{layers} streaming", difference(computed, model.expected(tokens, spec)), EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_notices_one_key_too_many(subject, family):
    """What the tests above can see: one position more or less in one layer is far outside of `EXACT`."""
    model = subject(family)
    tokens = random_tokens(1500)
    spec = model.spec(129, 1025)
    expected = model.expected(tokens, spec)
    for other in (replace(spec, sink=128), replace(spec, sink=130), replace(spec, window=1024), replace(spec, window=1026)):
        assert difference(expected, model.expected(tokens, other)) > 5 * EXACT
