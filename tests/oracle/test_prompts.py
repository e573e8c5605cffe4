"""`prefill = full`: prompts are read with full attention in every layer, what is decoded after them streams."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.families import FAMILIES
from support.native import PROMPT, STREAMING, Token
from support.oracle import EXACT, RELATIVE, Subject, difference, random_tokens
from support.transcript import Transcript

SINK, WINDOW, N_UBATCH = 4, 60, 32

# what happens in a conversation: ("read", tokens, batch size or None for one batch), ("decode", tokens, how many at once)
LONG = [("read", 500, None), ("decode", 40, 1)]
IN_BATCHES = [("read", 500, 128), ("decode", 40, 1)]
SHORT = [("read", 50, None), ("decode", 90, 1)]
CHAT = [
    ("read", 420, 100),
    ("decode", 30, 1),
    ("read", 9, None),
    ("decode", 80, 1),
    ("read", 350, None),
    ("decode", 5, 1),
    ("read", 70, 69),
    ("decode", 10, 1),
]
DRAFTS = [("read", 330, None), ("decode", 48, 8), ("read", 20, None), ("decode", 140, 35)]
CONVERSATIONS = {"long": LONG, "in-batches": IN_BATCHES, "short": SHORT, "chat": CHAT, "drafts": DRAFTS}


def run(transcript: Transcript, turns, most: bool = False) -> Transcript:
    for kind, n, size in turns:
        if kind == "read":
            transcript.read(n, size, most=most)
        else:
            transcript.decode(n, size)
    return transcript


def error(model: Subject, spec, turns, most: bool = False, **settings) -> float:
    settings = dict(n_ctx=1024, n_batch=1024, n_ubatch=N_UBATCH) | settings
    with model.context(spec, **settings) as context:
        transcript = run(Transcript(model, spec, context), turns, most)
        if spec is not None and spec.prefill == "full":
            assert context.kv_bytes(PROMPT) == 0
        return transcript.difference()


def family_cases():
    for number, family in enumerate(FAMILIES):
        for index, name in enumerate(CONVERSATIONS):
            for shape in [(4, 60), (0, 33), (129, 300)]:
                usual = shape == (4, 60) and (name == "chat" or index == number % 5)
                yield pytest.param(family, name, *shape, marks=() if usual else pytest.mark.full)


@pytest.mark.slow
@pytest.mark.parametrize("family, name, sink, window", list(family_cases()))
def test_conversation(subject, measured, family, name, sink, window):
    model = subject(family)
    spec = model.spec(sink, window, prefill="full")
    worst = error(model, spec, CONVERSATIONS[name], most=True, n_ctx=2048)
    measured(family, "prefill = full", worst, EXACT, conversation=name, spec=str(spec))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["none", "all"])
def test_no_layer_and_every_layer_streaming(subject, measured, family, layers):
    model = subject(family)
    spec = model.spec(SINK, WINDOW, range(model.n_layer), prefill="full") if layers == "all" else None
    measured(family, f"prefill = full, {layers} streaming", error(model, spec, CHAT), EXACT)


SETTINGS = [("f32", True), ("f16", False), ("f16", True), ("bf16", True), ("q8_0", True), ("q4_0", True)]


def kv_cases():
    for number, family in enumerate(FAMILIES):
        for index, (kv, flash) in enumerate(SETTINGS):
            usual = family in ("llama", "smollm3") or index == number % len(SETTINGS)
            yield pytest.param(family, kv, flash, marks=() if usual else pytest.mark.full)


@pytest.mark.slow
@pytest.mark.parametrize("family, kv, flash", list(kv_cases()))
def test_error_of_other_types_is_that_of_the_full_model(subject, measured, family, kv, flash):
    model = subject(family)
    spec = model.spec(SINK, WINDOW, prefill="full")
    full = error(model, None, CHAT, kv=kv, flash=flash, most=True)
    hybrid = error(model, spec, CHAT, kv=kv, flash=flash, most=True)
    setting = f"prefill = full, {kv} KV" + ", flash attention" * flash
    measured(family, setting, hybrid, RELATIVE * full, full=full, spec=str(spec))


@pytest.mark.slow
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("n_ubatch", [1, 16, 61, 512])
@pytest.mark.parametrize("n_batch", [1, 7, 59, 64, 65, 199, 398, 399, 400, 1000])
def test_every_split_of_a_prompt(subject, measured, n_batch, n_ubatch, flash):
    """Prompts and micro-batches of every size about the window's, the last batch having one token among others."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, [1, 2], prefill="full")
    turns = [("read", 400, n_batch), ("decode", 3, 1), ("read", 130, n_batch), ("decode", 3, 1)]
    settings = dict(n_ubatch=n_ubatch, flash=flash)
    full = error(model, None, turns, most=True, **settings) if flash else 0
    worst = error(model, spec, turns, most=True, **settings)
    if flash:
        measured("llama", "prefill = full, f32 KV, flash attention", worst, RELATIVE * full, full=full)
    else:
        measured("llama", "prefill = full, batch splits", worst, EXACT)


@pytest.mark.parametrize("n", [1, 2, SINK, WINDOW, SINK + WINDOW])
def test_a_prompt_no_longer_than_sink_and_window_equals_the_full_model(subject, measured, n):
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, range(4), prefill="full")
    tokens = random_tokens(SINK + WINDOW)
    with model.context(spec, n_ctx=512, n_ubatch=16) as context:
        read = context.read_prompt(tokens[:n])
        decoded = context.decode(tokens[n:], n)
    worst = difference(np.concatenate([read, decoded]), model.expected(tokens, None)[n - 1 :])
    measured("llama", "prefill = full, short prompts", worst, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["every", "last", "first"])
@pytest.mark.parametrize("n, n_batch", [(400, 64), (400, 400), (400, 399), (50, 50), (50, 7), (1, 1)])
def test_a_declared_prompt_is_one_whatever_logits_it_asks_for(subject, n, n_batch, asked):
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, [0, 3], prefill="full")
    wanted = {"every": [True] * n, "last": [False] * (n - 1) + [True], "first": [True] + [False] * (n - 1)}[asked]
    with model.context(spec, n_ctx=1536, n_ubatch=N_UBATCH) as context:
        transcript = Transcript(model, spec, context)
        for _turn in range(3):
            transcript.declare(n)
            for first in range(0, n, n_batch):
                part = wanted[first : first + n_batch]
                batch = transcript.batch(len(part), part)
                transcript.record(batch, context.decode_batch(batch))
                assert context.in_prompt() == (first + n_batch < n)
            transcript.decode(4)
        assert transcript.prompts == [((n + 4) * turn, (n + 4) * turn + n) for turn in range(3)]
        assert transcript.difference() <= EXACT


def test_a_declaration_is_cancelled_by_what_changes_the_sequence(subject):
    """What follows is what the logits say that it is."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, [0, 3], prefill="full")
    for cancel in (lambda c: c.seq_rm(0, 305, -1), lambda c: c.restore_seq(c.save_seq()), lambda c: c.clear()):
        with model.context(spec, n_ctx=1024, n_ubatch=N_UBATCH) as context:
            transcript = Transcript(model, spec, context)
            transcript.read(300)
            transcript.decode(10)
            context.prompt_begin(50)
            assert cancel(context) is not False
            transcript.forget(context.pos_max() + 1)
            if not len(transcript):
                transcript.read(300)
            transcript.decode(30, together=10)
            assert transcript.difference() <= EXACT


def test_streaming_prefill_ignores_declarations(subject):
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, [0, 3], prefill="stream")
    tokens = random_tokens(330)
    with model.context(spec, n_ctx=512, n_ubatch=N_UBATCH) as context:
        context.prompt_begin(330)
        computed = context.decode(tokens)
        assert not context.in_prompt() and context.kv_bytes(PROMPT) == 0
    assert difference(computed, model.expected(tokens, spec)) <= EXACT


def test_sequences_of_one_batch_that_ask_for_logits_decode(subject):
    """All tokens of a first batch ask: for the runtime they are decoded, and layers stream."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, [1, 2], prefill="full")
    tokens = random_tokens(330)
    with model.context(spec, n_ctx=512, n_ubatch=N_UBATCH) as context:
        computed = context.decode(tokens)
        assert not context.in_prompt()
    assert difference(computed, model.expected(tokens, replace(spec, prefill="stream"))) <= EXACT


def test_streaming_layers_hold_sinks_and_window_after_a_long_prompt(subject):
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, [1, 2], prefill="full")
    with model.context(spec, n_ctx=1024, n_ubatch=N_UBATCH) as context:
        transcript = Transcript(model, spec, context)
        transcript.read(500, 100, end=False)
        assert context.positions(STREAMING) == list(range(500)) and context.pos_min() == 0
        transcript.read(300, 100)
        assert context.positions(STREAMING) == [*range(SINK), *range(800 - WINDOW, 800)]
        assert context.pos_min() == 800 - WINDOW
        cells = context.kv_cells(STREAMING)
        transcript.decode(40)
        assert context.kv_cells(STREAMING) == cells


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_notices_one_key_too_many(subject, family):
    """What the tests above can see: a prompt that sees a position more, or begins or ends one later."""
    model = subject(family)
    tokens, begin, end = random_tokens(400), 200, 330
    spec = model.spec(SINK, WINDOW, prefill="full")
    expected = model.expected(tokens, spec, [(0, 120), (begin, end)])
    for first, last in ((120, (begin - 1, end)), (120, (begin + 1, end)), (120, (begin, end - 1)), (121, (begin, end))):
        assert difference(expected, model.expected(tokens, spec, [(0, first), last])) > 5 * EXACT
    for other in (replace(spec, window=WINDOW + 1), replace(spec, sink=SINK + 1)):
        assert difference(expected, model.expected(tokens, other, [(0, 120), (begin, end)])) > 5 * EXACT


def test_tokens_read_in_one_batch_with_a_prompt_of_several_micro_batches(subject):
    """Few of the tokens ask for logits: rows of logits and tokens no longer coincide."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, range(1, model.n_layer), prefill="full")
    tokens = random_tokens(330)
    wanted = [i % 50 == 29 for i in range(330)]
    with model.context(spec, n_ctx=512, n_ubatch=64) as context:
        computed = context.decode_batch(Token(int(t), i, logits=w) for i, (t, w) in enumerate(zip(tokens, wanted)))
        assert wanted[-1] and not context.in_prompt()
    assert difference(computed, model.expected(tokens, spec, [(0, 330)])[wanted]) <= EXACT
