"""Rewinding conversations that are read with `prefill = full`: what is allowed, and that the answers are exact then."""

from __future__ import annotations

import pytest
from support.native import FULL, STREAMING
from support.oracle import EXACT
from support.transcript import OPEN, Transcript

SINK, WINDOW, N_UBATCH = 4, 40, 32
LAYERS = pytest.mark.parametrize("layers", [[1, 2], range(4)], ids=["half", "all"])

# (read, n) ends a prompt, (begin, n) leaves it open
CONVERSATIONS = {
    "long-prompt": [("read", 400), ("decode", 30)],
    "short-message": [("read", 400), ("decode", 30), ("read", 20), ("decode", 15)],
    "short-messages": [("read", 30), ("decode", 20), ("read", 20), ("decode", 30), ("read", 25)],
    "long-message": [("read", 300), ("decode", 25), ("read", 280), ("decode", 5)],
    "long-answer": [("read", 50), ("decode", 400), ("read", 10)],
    "within-the-first": [("begin", 350)],
    "within-a-long-one": [("read", 300), ("decode", 60), ("begin", 300)],
    "within-a-short-one": [("read", 300), ("decode", 60), ("begin", 12)],
}


def run(transcript: Transcript, turns) -> Transcript:
    for kind, n in turns:
        if kind == "decode":
            transcript.decode(n)
        else:
            transcript.read(n, n_batch=90, end=kind == "read", most=True)
    return transcript


def first_seen(transcript: Transcript, end: int) -> int:
    """The first position behind the sinks that the next token may see after a rewind to `end`."""
    begin = next((b for b, e in transcript.prompts if b < end < e), end)
    return begin - WINDOW


def is_complete(transcript: Transcript, end: int, held: set[int]) -> bool:
    first = first_seen(transcript, end)
    return end == 0 or held.issuperset(p for p in range(end) if p < SINK or p >= first)


def context_of(model, layers, **settings):
    spec = model.spec(SINK, WINDOW, layers, prefill="full")
    return spec, model.context(spec, n_ctx=1024, n_ubatch=N_UBATCH, **settings)


def edges(transcript: Transcript) -> list[int]:
    """Positions about everything that could matter."""
    about = {0, SINK, WINDOW, len(transcript)}
    about |= {p for b, e in transcript.prompts for end in (b, e) if end != OPEN for p in (end, end - WINDOW, end + WINDOW)}
    about |= {(b + min(e, len(transcript))) // 2 for b, e in transcript.prompts}
    return sorted({p + i for p in about for i in (-1, 0, 1) if 0 <= p + i <= len(transcript)})


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_rewind(subject, layers, name):
    """To every edge, in a fresh context each; then a message is read and answered, whether it was allowed or not."""
    model = subject("llama")
    with context_of(model, layers)[1] as context:
        ends = edges(run(Transcript(model, model.spec(SINK, WINDOW, layers, prefill="full"), context), CONVERSATIONS[name]))
    outcomes: dict[bool, list[int]] = {True: [], False: []}
    for end in ends:
        spec, context = context_of(model, layers)
        with context:
            transcript = run(Transcript(model, spec, context), CONVERSATIONS[name])
            before = context.positions(FULL), context.positions(STREAMING), context.pos_min(), context.in_prompt()
            complete = is_complete(transcript, end, set(before[1]))
            outcomes[complete].append(end)
            assert transcript.rewind(end) == complete, f"to {end}"
            if complete:
                assert context.positions(FULL) == list(range(end))
            else:
                assert (context.positions(FULL), context.positions(STREAMING), context.pos_min(), context.in_prompt()) == before
            assert context.in_prompt() == transcript.in_prompt
            transcript.read(25, most=True)
            transcript.decode(12)
            assert transcript.difference() <= EXACT, f"to {end}"
    assert outcomes[True], "no edge at which a rewind is allowed was tried"
    if name in ("long-prompt", "long-message", "within-a-long-one"):
        assert outcomes[False], "no edge at which a rewind is refused was tried"


@LAYERS
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_pos_min_is_the_first_position_behind_which_every_rewind_is_possible(subject, layers, name):
    model = subject("llama")
    spec, context = context_of(model, layers)
    with context:
        transcript = run(Transcript(model, spec, context), CONVERSATIONS[name])
        held = set(context.positions(STREAMING))
        allowed = [is_complete(transcript, end, held) for end in range(len(transcript) + 1)]
        assert context.pos_min() == next(c for c in range(len(transcript) + 1) if all(allowed[c + WINDOW :]))


@pytest.mark.slow
@LAYERS
def test_answers_regenerated_again_and_again(subject, layers):
    """As many tokens are decoded in all as the streaming part has cells, several times over."""
    model = subject("llama")
    spec, context = context_of(model, layers)
    with context:
        transcript = run(Transcript(model, spec, context), [("read", 400)])
        for turn in range(12):
            transcript.decode(70)
            if turn % 3 == 2:
                transcript.read(30)
                transcript.decode(5)
            assert transcript.rewind(400)
        transcript.decode(70)
        assert transcript.difference() <= EXACT


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize("wanted", ["all", "last"])
def test_what_follows_a_rewind_into_a_prompt_belongs_to_it(subject, layers, wanted):
    """Also if all of it asks for logits: the prompt is open again. From its begin or its end on it is not."""
    model = subject("llama")
    for end, open_again in ((430, False), (431, True), (449, True), (450, False)):
        spec, context = context_of(model, layers)
        with context:
            transcript = run(Transcript(model, spec, context), [("read", 400), ("decode", 30), ("read", 20), ("decode", 3)])
            assert transcript.rewind(end)
            assert context.in_prompt() == transcript.in_prompt == open_again
            if wanted == "all":
                transcript.decode(25, together=25)
                assert transcript.prompts[1:] == ([(430, end + 25)] if open_again else [(430, 450)] * (end == 450))
            else:
                transcript.read(25)
            transcript.decode(60, together=6)
            assert transcript.difference() <= EXACT


@LAYERS
def test_rewinds_within_a_long_prompt_while_it_is_read(subject, layers):
    """Nothing of it is dropped before it ends."""
    model = subject("llama")
    spec, context = context_of(model, layers)
    with context:
        transcript = run(Transcript(model, spec, context), [("read", 200), ("decode", 20), ("begin", 400)])
        for end in (619, 500, 300, 221):
            assert transcript.rewind(end) and context.in_prompt()
            transcript.read(30, end=False, most=True)
        assert transcript.rewind(220) and not context.in_prompt()
        transcript.decode(10)
        transcript.read(300)
        transcript.decode(10)
        assert transcript.difference() <= EXACT


def test_removing_nothing_changes_nothing(subject):
    """llama-cpp-python removes what follows before each call."""
    model = subject("llama")
    spec, context = context_of(model, [1, 2])
    with context:
        transcript = Transcript(model, spec, context)
        for _ in range(3):
            transcript.read(200, end=False)
            assert context.seq_rm(0, len(transcript), -1) and context.in_prompt()
        transcript.read(100)
        assert context.seq_rm(0, len(transcript), -1) and not context.in_prompt()
        transcript.decode(20)
        assert transcript.difference() <= EXACT


def test_a_removed_sequence_begins_anew(subject):
    model = subject("llama")
    for remove in (lambda c: c.seq_rm(0, -1, -1), lambda c: c.seq_rm(0, 0, -1), lambda c: c.clear()):
        spec, context = context_of(model, range(4))
        with context:
            run(Transcript(model, spec, context), [("begin", 300)])
            assert remove(context) is not False and not context.in_prompt()
            transcript = Transcript(model, spec, context, seed=5)
            transcript.decode(100, together=100)
            transcript.read(50)
            assert transcript.difference() <= EXACT
