"""Context shift with `prefill = full`: after a long prompt, and further prompts after a shift."""

from __future__ import annotations

import pytest
from support.native import FULL, STREAMING, Token
from support.oracle import EXACT, RELATIVE, Subject, difference, random_tokens
from support.reference import NumpyLlama
from support.refusals import refuse_shift

from lt_gguf.spec import StreamingSpec

SINK, WINDOW = 6, 40
LAYERS = pytest.mark.parametrize("layers", [[1, 2], range(4)], ids=["half", "all"])


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize("n_message", [20, 150])
@pytest.mark.parametrize("n_keep, n_discard", [(SINK, 30), (SINK, 250), (20, 320), (100, 250)])
def test_context_shift(subject, measured, layers, n_keep, n_discard, n_message):
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers, prefill="full")
    worst = error_of_shifts(model, spec, n_keep, n_discard, n_message)
    measured("llama", "prefill = full, context shift", worst, EXACT, n_keep=n_keep, n_discard=n_discard)


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize("kv, flash", [("f16", True), ("q8_0", True)])
def test_context_shift_of_smaller_types(subject, measured, layers, kv, flash):
    model = subject("llama-mha")
    full = error_of_shifts(model, StreamingSpec.off(model.n_layer), 20, 250, 100, kv=kv, flash=flash)
    spec = model.spec(SINK, WINDOW, layers, prefill="full")
    hybrid = error_of_shifts(model, spec, 20, 250, 100, kv=kv, flash=flash)
    measured("llama-mha", f"prefill = full, context shift, {kv} KV", hybrid, RELATIVE * full, full=full)


def error_of_shifts(model: Subject, spec: StreamingSpec, n_keep: int, n_discard: int, n_message: int, **settings) -> float:
    """A long prompt, then answers, shifts as llama.cpp's tools make them, and messages, three times over."""
    conversation = NumpyLlama(model.hf, spec).conversation()
    worst, n_past, seed = 0.0, 0, 0

    def read(n: int) -> None:
        nonlocal worst, n_past, seed
        text, seed = random_tokens(n, seed=seed), seed + 1
        expected = conversation.decode(text, range(n_past, n_past + n), first=n_past - WINDOW)
        worst = max(worst, difference(context.read_prompt(text, n_past, n_batch=70), expected[-1:]))
        n_past += n

    def decode(n: int) -> None:
        nonlocal worst, n_past, seed
        text, seed = random_tokens(n, seed=seed), seed + 1
        expected = conversation.decode(text, range(n_past, n_past + n))
        worst = max(worst, difference(context.decode_one_by_one(text, n_past), expected))
        n_past += n

    with model.context(spec, n_ctx=512, n_batch=512, n_ubatch=32, **settings) as context:
        read(400)
        for _ in range(3):
            decode(440 - n_past)
            assert context.seq_rm(0, n_keep, n_keep + n_discard)
            context.seq_add(0, n_keep + n_discard, -1, -n_discard)
            n_past -= n_discard
            conversation.entries = [
                entry if entry.pos < n_keep else entry.at(entry.pos - n_discard)
                for entry in conversation.entries
                if not n_keep <= entry.pos < n_keep + n_discard
            ]
            decode(10)
            if n_past + n_message < 420:
                read(n_message)
            decode(10)
    return worst


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize("n_keep", [0, 1, SINK - 1])
def test_a_shift_that_needs_what_was_dropped_is_refused(subject, layers, n_keep):
    """Fewer tokens kept than there are sinks; the other sequence goes on and this one can be read again."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers, prefill="full")
    text = random_tokens(600)
    with model.context(spec, n_ctx=1024, n_batch=512, n_ubatch=32, n_seq_max=2, kv_unified=True) as context:
        context.read_prompt(text[:300], seq=1)
        context.read_prompt(text)
        refuse_shift(context, n_keep, 200)
        context.decode(text[300:320], 300, seq=1)
        assert context.seq_rm(0, -1, -1)
        computed = context.read_prompt(text[:400])
        assert difference(computed, model.expected(text[:400], spec, [(0, 400)])[-1:]) <= EXACT


@LAYERS
def test_rewinds_into_a_shifted_prompt(subject, layers):
    """What was a prompt's middle still is one: it goes on seeing the tokens that it saw, at their new positions."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers, prefill="full")
    text, message, again = random_tokens(400), random_tokens(30, seed=1), random_tokens(25, seed=2)
    conversation = NumpyLlama(model.hf, spec).conversation()
    with model.context(spec, n_ctx=512, n_batch=512, n_ubatch=32) as context:
        context.read_prompt(text)
        conversation.decode(text, range(400), first=0)
        context.read_prompt(message, 400)
        conversation.decode(message, range(400, 430), first=400 - WINDOW)
        assert context.seq_rm(0, SINK, SINK + 100)
        context.seq_add(0, SINK + 100, -1, -100)
        conversation.entries = conversation.entries[:SINK] + [e.at(e.pos - 100) for e in conversation.entries[SINK + 100 :]]
        assert context.seq_rm(0, 315, -1) and context.in_prompt()
        conversation.entries = [entry for entry in conversation.entries if entry.pos < 315]
        assert context.positions(FULL) == list(range(315))
        assert set(context.positions(STREAMING)) >= {*range(SINK), *range(300 - WINDOW, 315)}
        expected = conversation.decode(again, range(315, 340), first=300 - WINDOW)
        assert difference(context.decode(again, 315), expected) <= EXACT


@LAYERS
def test_a_shift_while_a_long_prompt_is_read(subject, layers):
    """Its tokens go on seeing all of it that is left."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers, prefill="full")
    text = random_tokens(500)
    conversation = NumpyLlama(model.hf, spec).conversation()
    with model.context(spec, n_ctx=512, n_batch=512, n_ubatch=32) as context:
        context.decode_batch(prompt_part(text[:400]))
        conversation.decode(text[:400], range(400), first=0)
        assert context.seq_rm(0, 50, 150)
        context.seq_add(0, 150, -1, -100)
        conversation.entries = conversation.entries[:50] + [e.at(e.pos - 100) for e in conversation.entries[150:]]
        expected = conversation.decode(text[400:], range(300, 400), first=0)
        assert difference(context.read_prompt(text[400:], 300), expected[-1:]) <= EXACT
        answer = random_tokens(20, seed=1)
        expected = conversation.decode(answer, range(400, 420))
        assert difference(context.decode_one_by_one(answer, 400), expected) <= EXACT


def prompt_part(text) -> list[Token]:
    return [Token(int(token), i, logits=False) for i, token in enumerate(text)]
