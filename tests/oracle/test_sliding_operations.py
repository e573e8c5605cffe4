"""Going back, saving, shifting and choosing layers in models whose other layers have a sliding window of their own."""

from __future__ import annotations

import re

import numpy as np
import pytest
from support.families import OWN_WINDOW, SLIDING_FAMILIES
from support.lazy import laziest, lazy_ratios
from support.native import FULL, PARTIAL, STREAMING, SWA, DecodeError, log
from support.oracle import EXACT, Subject, difference, random_tokens
from support.refusals import restore_damaged
from support.transcript import Transcript

SINK = 4
SETTINGS = dict(n_ctx=1024, n_batch=512, n_ubatch=32)
FAMILY = pytest.mark.parametrize("family", SLIDING_FAMILIES)
WINDOWS = pytest.mark.parametrize("window", [20, 130], ids=["shorter", "longer"])
CACHES = pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])
TEXT, OTHER = random_tokens(700), random_tokens(700, seed=1)


def seen(p: int, q: int) -> bool:
    """Whether a layer with a window of its own lets the query at `q` see the key at `p`."""
    return p < q and q - p < OWN_WINDOW


@pytest.mark.slow
@WINDOWS
@FAMILY
def test_rewinding(subject, measured, family, window):
    """seq_rm succeeds exactly where all layers still have what the next token sees, and then the answers are those of a fresh context."""
    model: Subject = subject(family)
    spec = model.spec(SINK, window)
    n_done = n_refused = 0
    for back in (1, 2, 64, 150, *range(190, 250, 6), 300, 695, 700):
        with model.context(spec, **SETTINGS) as context:
            context.decode(TEXT)
            kept = 700 - back
            held = context.positions(STREAMING), context.positions(SWA)
            complete = all(p in held[0] for p in range(kept) if spec.visible(kept, p))
            complete = complete and all(p in held[1] for p in range(kept) if seen(p, kept))
            assert context.can_rm(0, kept) == complete and context.seq_rm(0, kept, -1) == complete
            if complete:
                new = np.concatenate([TEXT[:kept], OTHER[:80]])
                computed, expected = context.decode(OTHER[:80], kept), model.expected(new, spec)[kept:]
                n_done += 1
            else:
                assert (context.positions(STREAMING), context.positions(SWA)) == held and context.pos_max() == 699
                assert context.pos_min() > kept - max(window, OWN_WINDOW)
                more = np.concatenate([TEXT, OTHER[:5]])
                computed, expected = context.decode(OTHER[:5], 700), model.expected(more, spec)[700:]
                n_refused += 1
            measured(family, "own windows, rewind", difference(computed, expected), EXACT, back=back)
    assert n_done >= 3 and n_refused >= 3


@WINDOWS
def test_the_smallest_position_says_how_far_back(subject, window):
    """What holds for any llama.cpp memory: from `pos_min` plus the model's window on everything can be removed. And one token before the
    edge can't, whichever of the layers lacks it."""
    model: Subject = subject("cohere2")
    spec = model.spec(SINK, window)
    with model.context(spec, **SETTINGS) as context:
        context.decode(TEXT)
        edge = next(p for p in range(700) if p > SINK and context.can_rm(0, p))
        assert edge <= context.pos_min() + max(window, OWN_WINDOW) <= edge + 1
        assert not context.seq_rm(0, edge - 1, -1) and context.seq_rm(0, edge, -1)
        computed = context.decode(OTHER[:60], edge)
    expected = model.expected(np.concatenate([TEXT[:edge], OTHER[:60]]), spec)[edge:]
    assert difference(computed, expected) <= EXACT


@pytest.mark.parametrize("together", [2, 16, 31])
def test_a_draft_can_be_taken_back(subject, together):
    """However often, and whatever another sequence reads meanwhile."""
    model: Subject = subject("gpt-oss")
    spec = model.spec(SINK, 60, prefill="full")
    with model.context(spec, **SETTINGS | {"n_ctx": 4096, "n_seq_max": 2, "kv_unified": True}) as context:
        transcript, other = Transcript(model, spec, context), Transcript(model, spec, context, seq=1)
        transcript.read(300)
        for _ in range(6):
            end = len(transcript)
            transcript.decode(together, together)
            other.read(400)
            assert transcript.rewind(end)
            transcript.decode(1)
        assert transcript.difference() <= EXACT and other.difference() <= EXACT


@pytest.mark.slow
@CACHES
@FAMILY
@pytest.mark.parametrize("what", ["whole", "sequence", "begun"])
def test_a_state_in_another_context(subject, family, unified, what):
    """Of both sequences or of one of them, also in the middle of its prompt; into a context of another size."""
    model: Subject = subject(family)
    spec = model.spec(SINK, 60, prefill="full")
    settings = SETTINGS | {"n_seq_max": 2, "kv_unified": unified, "n_ctx": 2048}
    with model.context(spec, **settings) as context:
        first, second = Transcript(model, spec, context), Transcript(model, spec, context, seq=1)
        first.read(400, 100)
        first.decode(20)
        second.read(330, 100, end=what != "begun")
        state = context.save() if what == "whole" else context.save_seq(1)
    with model.context(spec, **settings | {"n_ubatch": 64, "n_ctx": 4096}) as context:
        context.decode(OTHER[:333], seq=1)  # what was there before must not matter
        if what == "whole":
            assert context.restore(state)
            transcripts = [first.copy(0, context), second.copy(1, context)]
        else:
            assert context.restore_seq(state, 1)
            transcripts = [second.copy(1, context)]
        for transcript in transcripts:
            assert context.positions(FULL, transcript.seq) == list(range(len(transcript)))
            if what == "begun":
                transcript.read(100)
            transcript.decode(70)
            assert transcript.difference() <= EXACT


@CACHES
@WINDOWS
def test_a_checkpoint(subject, measured, unified, window):
    """What all layers but the full ones hold, much more text, and back to it: the answers are those of a fresh context."""
    model: Subject = subject("gemma3")
    spec = model.spec(SINK, window, model.may_stream[:1])
    with model.context(spec, **SETTINGS | {"n_seq_max": 2, "kv_unified": unified, "n_ctx": 2048}) as context:
        context.decode(TEXT[:200])
        assert context.can_checkpoint()
        checkpoint, everything = context.save_seq(0, PARTIAL), context.save_seq(0)
        assert len(checkpoint) < len(everything)
        context.decode(TEXT[200:], 200)
        assert not context.seq_rm(0, 200, -1)
        assert context.restore_seq(checkpoint, 0, PARTIAL)
        with pytest.raises(DecodeError) as refusal:  # the full part still has what came after
            context.decode([5], 700)
        assert refusal.value.code < 0
        assert context.seq_rm(0, 200, -1)
        computed = context.decode(OTHER[:300], 200)
    expected = model.expected(np.concatenate([TEXT[:200], OTHER[:300]]), spec)[200:]
    measured("gemma3", "own windows, checkpoint", difference(computed, expected), EXACT)


def test_a_checkpoint_grows_with_the_windows_only(subject):
    model: Subject = subject("gemma3")
    spec = model.spec(SINK, 60)
    with model.context(spec, **SETTINGS) as context:
        context.decode(TEXT[:150])
        early = len(context.save_seq(0, PARTIAL))
        context.decode(TEXT[150:], 150)
        late = len(context.save_seq(0, PARTIAL))
    assert abs(late - early) <= model.n_layer * 2 * 2 * 64 * 4  # a position of each layer


def test_a_damaged_state_is_refused(subject):
    model: Subject = subject("olmo3")
    spec = model.spec(SINK, 60)
    with model.context(spec, **SETTINGS | {"n_seq_max": 2, "kv_unified": True}) as context:
        context.decode(TEXT[:200])
        state = context.save_seq(0)
        restore_damaged(context, state, 1, np.random.default_rng(0))
        assert context.restore_seq(state, 1)
        computed = context.decode(TEXT[200:250], 200, seq=1)
    assert difference(computed, model.expected(TEXT[:250], spec)[200:]) <= EXACT


@pytest.mark.parametrize("n_keep, n_discard", [(SINK, 250), (SINK, 380), (100, 250), (100, 290)])
def test_a_shift_is_exact(subject, measured, n_keep, n_discard):
    """Against a context with so large a micro-batch that the layers with their own window hold everything."""
    model: Subject = subject("gemma3")
    rows = []
    for n_ubatch in (32, 512):
        with model.context(model.spec(SINK, 20), n_ctx=512, n_batch=512, n_ubatch=n_ubatch) as context:
            assert context.can_shift()
            context.decode(TEXT[:440])
            assert (len(context.positions(SWA)) == 440) == (n_ubatch == 512)
            assert context.seq_rm(0, n_keep, n_keep + n_discard)
            context.seq_add(0, n_keep + n_discard, -1, -n_discard)
            rows.append(context.decode(OTHER[:60], 440 - n_discard))
    measured("gemma3", "own windows, context shift", difference(*rows), EXACT)


@pytest.mark.parametrize("n_keep, n_discard", [(SINK, 430), (100, 320)])
def test_a_shift_that_shows_what_was_dropped_is_refused(subject, n_keep, n_discard):
    """Kept tokens come into the window of layers that have dropped them: a line says so, and the sequence can't be decoded."""
    model: Subject = subject("gemma3")
    with model.context(model.spec(SINK, 5), n_ctx=512, n_batch=512, n_ubatch=32) as context:
        context.decode(TEXT[:440])
        assert context.seq_rm(0, n_keep, n_keep + n_discard)
        start = log.mark()
        context.seq_add(0, n_keep + n_discard, -1, -n_discard)
        assert "those with a window of their own" in " ".join(log.since(start))
        with pytest.raises(DecodeError):
            context.decode([5], 440 - n_discard)
        assert context.seq_rm(0, -1, -1)
        expected = model.expected(TEXT[:300], model.spec(SINK, 5))
        assert difference(context.decode(TEXT[:300]), expected) <= EXACT


@pytest.mark.slow
@FAMILY
@pytest.mark.parametrize("lazy", ["min", "mean"])
def test_layers_that_are_chosen_for_the_prompt(subject, measured, family, lazy):
    """Only those with full attention are measured, and a share is of them."""
    model: Subject = subject(family)
    ratios = lazy_ratios(model.hf, TEXT[:500], SINK, 60, 16, lazy)
    with model.context(f"auto=0.5;sink={SINK};window=60;w_last=16;lazy={lazy}", **SETTINGS) as context:
        context.read_prompt(TEXT[:500])
        found = context.lazy_ratios()
        assert np.flatnonzero(~np.isnan(found)).tolist() == model.may_stream
        measured(family, "own windows, lazy ratio", np.abs(found - ratios)[model.may_stream].max(), 1e-5)
        layers = tuple(model.may_stream[i] for i in laziest(ratios[model.may_stream], 0.5))
        assert re.search(r"layers=([^;]*)", context.streaming())[1] == ",".join(map(str, layers))
        spec = model.spec(SINK, 60, layers, prefill="full")
        computed = context.decode(TEXT[500:560], 500)
    expected = model.expected(TEXT[:560], spec, [(0, 500)])[500:]
    measured(family, "own windows, chosen for the prompt", difference(computed, expected), EXACT)
