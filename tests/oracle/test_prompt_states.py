"""Saved states with `prefill = full`: whole, one sequence, and the streaming part alone, from every phase."""

from __future__ import annotations

import numpy as np
import pytest
from support.native import FULL, PARTIAL, PROMPT, STREAMING, log
from support.oracle import EXACT
from support.refusals import restore_damaged
from support.transcript import Transcript

SINK, WINDOW = 4, 40
SETTINGS = dict(n_batch=1024, n_ubatch=32, n_seq_max=2)
CACHES = pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])
LAYERS = pytest.mark.parametrize("layers", [[0, 2], range(4)], ids=["half", "all"])
MOMENTS = {
    "after a prompt": [("read", 400, True)],
    "in the first prompt": [("read", 400, False)],
    "in a long prompt": [("read", 200, True), ("decode", 20, None), ("read", 300, False)],
    "in a short prompt": [("read", 300, True), ("decode", 20, None), ("read", 15, False)],
    "after several turns": [("read", 300, True), ("decode", 50, None), ("read", 20, True), ("decode", 30, None)],
}
ALL_MOMENTS = pytest.mark.parametrize("moment", MOMENTS)


def context_of(model, layers, n_ctx=2048, **settings):
    spec = model.spec(SINK, WINDOW, layers, prefill="full")
    return spec, model.context(spec, n_ctx=n_ctx, **SETTINGS | settings)


def run(transcript: Transcript, moment: str) -> Transcript:
    for kind, n, end in MOMENTS[moment]:
        if kind == "read":
            transcript.read(n, n_batch=150, end=end)
        else:
            transcript.decode(n)
    return transcript


def run_both(model, spec, context, moment: str, other: str) -> tuple[Transcript, Transcript]:
    """Two sequences of one context, each at a moment of its own."""
    return run(Transcript(model, spec, context, 0), moment), run(Transcript(model, spec, context, 1), other)


def go_on(transcript: Transcript) -> None:
    """The rest of a prompt or a message, and an answer longer than the window; compared with transformers."""
    assert transcript.context.in_prompt(transcript.seq) == transcript.in_prompt
    transcript.read(80, n_batch=33, most=True)
    transcript.decode(WINDOW + 10, together=10)
    assert transcript.difference() <= EXACT


@pytest.mark.slow
@ALL_MOMENTS
@LAYERS
@CACHES
def test_into_the_same_context(subject, unified, layers, moment):
    """Both sequences go on, and then again from the state, as often as one likes."""
    model = subject("llama")
    spec, context = context_of(model, layers, kv_unified=unified)
    with context:
        first, second = run_both(model, spec, context, moment, "after several turns")
        whole, single = context.save(), context.save_seq(0)
        originals = first.copy(0), second.copy(1)
        go_on(first)
        go_on(second)
        for _ in range(2):
            assert context.restore(whole)
            for original in originals:
                assert context.positions(FULL, original.seq) == list(range(len(original)))
                go_on(original.copy(original.seq))
        assert context.restore_seq(single, 0)
        go_on(originals[0].copy(0))


@pytest.mark.slow
@ALL_MOMENTS
@LAYERS
@CACHES
@pytest.mark.parametrize("n_ctx, n_ubatch", [(2048, 32), (4096, 64), (1400, 16), (2048, 512)])
def test_into_another_context(subject, n_ctx, n_ubatch, unified, layers, moment):
    """Of another size, in which other text was."""
    model = subject("llama")
    spec, context = context_of(model, layers, kv_unified=unified)
    with context:
        first, second = run_both(model, spec, context, moment, "in a long prompt")
        whole, single = context.save(), context.save_seq(0)
    for what in ("whole", "sequence"):
        _, context = context_of(model, layers, n_ctx, n_ubatch=n_ubatch, kv_unified=unified)
        with context:
            Transcript(model, spec, context, 0, seed=9).read(450, end=False)
            if what == "whole":
                assert context.restore(whole)
                go_on(first.copy(0, context))
                go_on(second.copy(1, context))
            else:
                assert context.restore_seq(single, 1)
                go_on(first.copy(1, context))


@pytest.mark.slow
@LAYERS
@CACHES
@pytest.mark.parametrize("moment", ["after a prompt", "in a long prompt"])
def test_a_context_that_is_too_small_says_so(subject, unified, layers, moment):
    """And is left as if nothing had been there."""
    model = subject("llama")
    spec, context = context_of(model, layers, kv_unified=unified)
    with context:
        run(Transcript(model, spec, context, 0), moment)
        whole, single = context.save(), context.save_seq(0)
    for restore in (lambda c: c.restore(whole), lambda c: c.restore_seq(single, 0)):
        _, context = context_of(model, layers, 256 if unified else 512, kv_unified=unified)
        with context:
            other = Transcript(model, spec, context, 1, seed=4)
            other.read(100)
            start = log.mark()
            assert not restore(context)
            assert any("cells" in line or "room" in line or "n_ctx" in line for line in log.since(start))
            assert context.positions(FULL, 0) == context.positions(STREAMING, 0) == []
            assert not context.in_prompt(0)
            again = Transcript(model, spec, context, 0, seed=6)
            assert context.seq_rm(0, -1, -1) and context.seq_rm(1, -1, -1)
            again.read(100)
            again.decode(60)
            assert again.difference() <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("flags", [0, PARTIAL])
@pytest.mark.parametrize("moment", ["after a prompt", "in a long prompt"])
def test_a_state_of_another_spec_is_refused(subject, flags, moment):
    model = subject("llama")
    spec, context = context_of(model, [1])
    with context:
        run(Transcript(model, spec, context), moment)
        state = context.save_seq(0, flags)
    others = [
        model.spec(SINK, WINDOW, [2], prefill="full"),
        model.spec(SINK, WINDOW + 1, [1], prefill="full"),
        model.spec(SINK + 1, WINDOW, [1], prefill="full"),
        model.spec(SINK, WINDOW, [1], prefill="stream"),
    ]
    for other in others:
        with model.context(other, n_ctx=2048, **SETTINGS) as context:
            transcript = Transcript(model, other, context, 1)
            transcript.read(50)
            start = log.mark()
            assert not context.restore_seq(state, 0, flags)
            assert any("spec" in line or "layers=" in line for line in log.since(start)), log.since(start)
            transcript.read(60)
            transcript.decode(50)
            assert transcript.difference() <= EXACT


@pytest.mark.slow
@ALL_MOMENTS
@LAYERS
@CACHES
def test_a_checkpoint(subject, measured, unified, layers, moment):
    """The streaming part alone, much more text, back to the checkpoint: exactly the moment of saving."""
    model = subject("llama")
    spec, context = context_of(model, layers, kv_unified=unified)
    with context:
        saved = run(Transcript(model, spec, context), moment)
        checkpoint, end = context.save_seq(0, PARTIAL), len(saved)
        held = context.positions(STREAMING)
        later = saved.copy(0)
        later.read(300, n_batch=100)
        later.decode(60)
        for _ in range(2):
            assert context.restore_seq(checkpoint, 0, PARTIAL)
            assert context.seq_rm(0, end, -1)
            assert context.positions(FULL) == list(range(end))
            assert set(context.positions(STREAMING)) <= set(held)
            now = saved.copy(0)
            go_on(now)
            assert context.kv_bytes(PROMPT) == 0
            measured("llama", "prefill = full, checkpoint", now.difference(), EXACT, moment=moment)


def test_a_checkpoint_of_every_turn(subject):
    """A long conversation with a checkpoint at each message; any of them can be edited, in any order."""
    model = subject("llama")
    spec, context = context_of(model, range(4))
    with context:
        transcript, checkpoints = Transcript(model, spec, context), []
        for n_message, n_answer in [(300, 40), (10, 90), (150, 20), (12, 60), (200, 70)]:
            checkpoints.append((context.save_seq(0, PARTIAL), transcript.copy(0)) if len(transcript) else None)
            transcript.read(n_message, n_batch=128)
            transcript.decode(n_answer)
        assert transcript.difference() <= EXACT
        for turn in (4, 2, 1):  # each is still a beginning of what is there
            checkpoint, before = checkpoints[turn]
            assert context.restore_seq(checkpoint, 0, PARTIAL) and context.seq_rm(0, len(before), -1)
            before.read(90, most=True)
            before.decode(60)
            assert before.difference() <= EXACT


def test_a_checkpoint_is_small_where_the_context_says_so(subject):
    """It holds sinks, window and spare cells, not the conversation; in the middle of a long prompt it holds that."""
    model = subject("llama")
    spec, context = context_of(model, range(4))
    bytes_a_position = 4 * 2 * model.n_layer * 2 * 32  # f32, K and V, n_kv heads of 32
    with context:
        transcript = Transcript(model, spec, context)
        transcript.read(400)
        assert (SINK + WINDOW) * bytes_a_position <= len(context.save_seq(0, PARTIAL)) < (SINK + WINDOW + 8) * bytes_a_position
        transcript.decode(200)
        transcript.read(20, end=False)
        assert context.can_checkpoint() and len(context.save_seq(0, PARTIAL)) < 264 * bytes_a_position
        transcript.read(400, end=False)
        assert not context.can_checkpoint() and len(context.save_seq(0, PARTIAL)) > 400 * bytes_a_position
        transcript.read(1)
        assert context.can_checkpoint()


@pytest.mark.parametrize("length", [0, 5000, 2**32 - 1])
def test_a_damaged_length_of_a_text_is_refused_before_it_is_read(subject, length):
    model = subject("llama")
    spec, context = context_of(model, [1, 2])
    with context:
        saved = run(Transcript(model, spec, context), "after a prompt")
        state = context.save_seq(0)
        at = state.index(b"LTK2") + 4  # of the spec's length
        start = log.mark()
        assert not context.restore_seq(state[:at] + length.to_bytes(4, "little") + state[at + 4 :], 1)
        assert "the beginning of the state is damaged" in " ".join(log.since(start))
        go_on(saved)


@pytest.mark.slow
def test_damaged_states_are_refused(subject):
    """Cut or changed ones end in a refusal or in something valid; the context stays usable."""
    model = subject("llama")
    spec, context = context_of(model, [1, 2])
    random = np.random.default_rng(0)
    with context:
        for moment in MOMENTS:
            context.clear()
            saved = run(Transcript(model, spec, context), moment)
            state = context.save_seq(0)
            restore_damaged(context, state, 1, random)
            assert context.restore_seq(state, 1)
            go_on(saved.copy(1))
