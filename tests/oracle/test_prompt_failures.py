"""Batches that fail in the middle of a prompt, with `prefill = full`: nothing is lost, and nothing is silently wrong."""

from __future__ import annotations

import pytest
from support.native import FULL, PROMPT, STREAMING, DecodeError
from support.oracle import EXACT
from support.transcript import Transcript

SINK, WINDOW, N_UBATCH = 4, 40, 32
LAYERS = pytest.mark.parametrize("layers", [[1, 2], range(4)], ids=["half", "all"])
CACHES = pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])


def start(model, layers, **settings):
    spec = model.spec(SINK, WINDOW, layers, prefill="full")
    context = model.context(spec, **dict(n_ctx=512, n_batch=512, n_ubatch=N_UBATCH) | settings)
    return Transcript(model, spec, context), context


def state(context) -> tuple:
    return context.positions(FULL), context.positions(STREAMING), context.in_prompt(), context.pos_min(), context.kv_bytes(PROMPT)


def fail(transcript: Transcript, n: int, wanted) -> int:
    """Feeds a batch that the context must refuse or stop at; returns llama_decode's code."""
    batch = transcript.copy(transcript.seq).batch(n, wanted)
    with pytest.raises(DecodeError) as failure:
        transcript.context.decode_batch(batch)
    return failure.value.code


@pytest.mark.slow
@CACHES
@LAYERS
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("before", ["a prompt", "an answer", "a prompt's middle"])
def test_a_batch_for_which_there_is_no_room_changes_nothing(subject, unified, layers, before, end):
    transcript, context = start(subject("llama"), layers, kv_unified=unified)
    with context:
        transcript.read(300, end=before != "a prompt's middle", most=True)
        if before == "an answer":
            transcript.decode(20)
        was = state(context)
        for n in (513 - len(transcript), 512):
            assert fail(transcript, n, [False] * (n - 1) + [end]) == 1
            assert state(context) == was
        transcript.read(60, most=True)
        transcript.decode(60, together=6)
        assert transcript.difference() <= EXACT


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize("n_checks", [0, 100, 400, 900])
@pytest.mark.parametrize("then", ["go on", "rewind", "begin of the prompt", "decode"])
def test_an_aborted_prompt(subject, layers, n_checks, then):
    """It stops after some micro-batches; they are kept, and the prompt is still being read."""
    transcript, context = start(subject("llama"), layers, n_ctx=1024, n_batch=1024)
    with context:
        transcript.read(200)
        transcript.decode(30)
        batch = transcript.copy(0).batch(400, [False] * 399 + [True])
        context.abort_after(n_checks)
        with pytest.raises(DecodeError) as failure:
            context.decode_batch(batch)
        assert failure.value.code == 2
        context.abort_after(None)
        n_read = context.pos_max() + 1
        assert 230 <= n_read < 630 and (n_read - 230) % N_UBATCH == 0
        if n_read > 230:
            transcript.tokens += [token.id for token in batch[: n_read - 230]]
            transcript.prompts.append((230, 2**31 - 1))
        assert context.in_prompt() == transcript.in_prompt
        assert context.positions(FULL) == list(range(n_read))
        if then == "rewind" and n_read > 240:
            assert transcript.rewind(240)
        elif then == "begin of the prompt":
            assert transcript.rewind(230) and not context.in_prompt()
        if then == "decode":
            transcript.decode(20, together=20)  # ends the prompt, if one is being read
        else:
            transcript.read(150, n_batch=70, most=True)
        transcript.decode(30)
        assert context.kv_bytes(PROMPT) == 0
        assert transcript.difference() <= EXACT


@LAYERS
@pytest.mark.parametrize("n_checks", [0, 150, 300])
def test_an_aborted_check_of_a_draft(subject, layers, n_checks):
    """It decodes; what was computed of it stays, and what follows streams."""
    transcript, context = start(subject("llama"), layers, n_ctx=1024, n_batch=1024)
    with context:
        transcript.read(300)
        batch = transcript.copy(0).batch(100, [True] * 100)
        context.abort_after(n_checks)
        with pytest.raises(DecodeError) as failure:
            context.decode_batch(batch)
        assert failure.value.code == 2
        context.abort_after(None)
        transcript.tokens += [token.id for token in batch[: context.pos_max() + 1 - 300]]
        assert not context.in_prompt()
        transcript.decode(30)
        assert transcript.rewind(300)
        transcript.decode(5)
        transcript.read(200)
        transcript.decode(5)
        assert transcript.difference() <= EXACT


def test_an_abort_leaves_other_sequences_alone(subject):
    model = subject("llama")
    first, context = start(model, range(4), n_ctx=2048, n_batch=1024, n_seq_max=2, kv_unified=True)
    with context:
        second = Transcript(model, first.spec, context, 1)
        first.read(300, end=False, most=True)
        second.read(300)
        second.decode(10)
        context.abort_after(300)
        with pytest.raises(DecodeError):
            context.decode_batch(first.copy(0).batch(300, [False] * 299 + [True]))
        context.abort_after(None)
        second.decode(30)
        assert first.rewind(280) and context.in_prompt(0)
        first.read(120, most=True)
        first.decode(20)
        second.decode(10)
        assert first.difference() <= EXACT and second.difference() <= EXACT
