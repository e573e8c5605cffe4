"""Saved and restored states: whole, one sequence, and the streaming part alone (llama-server's checkpoints)."""

from __future__ import annotations

import numpy as np
import pytest
from support.native import FULL, PARTIAL, DecodeError
from support.oracle import EXACT, difference, random_tokens
from support.refusals import restore_damaged

SINK, WINDOW = 4, 30
SETTINGS = dict(n_batch=512, n_ubatch=32, n_seq_max=2)
CACHES = pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])
LAYERS = pytest.mark.parametrize("layers", [[0, 2], range(4)], ids=["half", "all"])
TEXT, OTHER = random_tokens(500), random_tokens(500, seed=1)


@pytest.mark.slow
@CACHES
@LAYERS
@pytest.mark.parametrize("what", ["whole", "sequence"])
@pytest.mark.parametrize("kv, bound", [("f32", EXACT), ("f16", 0.02), ("q8_0", 0.02)])
def test_into_another_context(subject, what, unified, layers, kv, bound):
    """The state of one context goes on in another one, which may have another n_ctx and n_ubatch.

    Flash attention adds up in f16, in the order of the cells, and that may be another one: hence the larger bounds.
    """
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers)
    settings = SETTINGS | dict(kv=kv, flash=kv != "f32", kv_unified=unified)
    with model.context(spec, n_ctx=1024, **settings) as context:
        context.decode(TEXT[:400], seq=0)
        context.decode(OTHER[:350], seq=1)
        whole, single = context.save(), context.save_seq(1)
        expected = context.decode(TEXT[400:450], 400, seq=0), context.decode(OTHER[350:400], 350, seq=1)
    with model.context(spec, n_ctx=2048, **settings | {"n_ubatch": 64}) as context:
        context.decode(OTHER[100:333], seq=0)  # what was there before must not matter
        if what == "whole":
            assert context.restore(whole)
            assert context.positions(FULL, 0) == list(range(400))
            assert difference(context.decode(TEXT[400:450], 400, seq=0), expected[0]) <= bound
            last = 1
        else:
            assert context.restore_seq(single, 0)
            last = 0
        assert context.positions(FULL, last) == list(range(350))
        assert difference(context.decode(OTHER[350:400], 350, seq=last), expected[1]) <= bound


@CACHES
@LAYERS
def test_the_streaming_part_alone(subject, measured, unified, layers):
    """A checkpoint, much more text, back to the checkpoint: the answers are those of a fresh context."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers)
    with model.context(spec, n_ctx=2048, kv_unified=unified, **SETTINGS) as context:
        context.decode(TEXT[:100])
        checkpoint, everything = context.save_seq(0, PARTIAL), context.save_seq(0)
        assert len(checkpoint) < len(everything)
        context.decode(TEXT[100:], 100)
        assert not context.seq_rm(0, 100, -1)
        assert context.restore_seq(checkpoint, 0, PARTIAL)
        with pytest.raises(DecodeError) as refusal:  # the full part still has what came after
            context.decode([5], 500)
        assert refusal.value.code < 0
        assert context.seq_rm(0, 100, -1)
        assert context.positions(FULL) == list(range(100)) and context.pos_max() == 99
        computed = context.decode(OTHER[:300], 100)
    expected = model.expected(np.concatenate([TEXT[:100], OTHER[:300]]), spec)[100:]
    measured("llama", "checkpoint", difference(computed, expected), EXACT)


def test_a_checkpoint_is_small(subject):
    """It holds sinks and window, not the conversation."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, range(4))
    with model.context(spec, n_ctx=1024, **SETTINGS) as context:
        context.decode(TEXT[:100])
        early = len(context.save_seq(0, PARTIAL))
        context.decode(TEXT[100:], 100)
        late = len(context.save_seq(0, PARTIAL))
    bytes_a_position = 4 * 2 * model.n_layer * 2 * 32  # f32, K and V, n_kv heads of 32
    assert abs(late - early) <= bytes_a_position
    assert (SINK + WINDOW - 1) * bytes_a_position <= late < (SINK + WINDOW + 8) * bytes_a_position


@pytest.mark.parametrize("flags", [0, PARTIAL])
def test_a_state_of_another_spec_is_refused(subject, flags):
    model = subject("llama")
    with model.context(model.spec(SINK, WINDOW, [1]), n_ctx=1024, **SETTINGS) as context:
        context.decode(TEXT[:200])
        state = context.save_seq(0, flags)
    for other in (model.spec(SINK, WINDOW, [2]), model.spec(SINK, WINDOW + 1, [1]), model.spec(SINK + 1, WINDOW, [1]), None):
        with model.context(other, n_ctx=1024, **SETTINGS) as context:
            context.decode(TEXT[:50], seq=1)
            if flags == 0 or other is not None:
                assert not context.restore_seq(state, 0, flags)
            expected = model.expected(TEXT[:60], other)[50:]
            assert difference(context.decode(TEXT[50:60], 50, seq=1), expected) <= EXACT


def test_a_damaged_state_is_refused(subject):
    """Cut or changed states end in a refusal or in something valid; the context stays usable."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW)
    random = np.random.default_rng(0)
    with model.context(spec, n_ctx=1024, **SETTINGS) as context:
        context.decode(TEXT[:200])
        state = context.save_seq(0)
        restore_damaged(context, state, 1, random)
        assert context.restore_seq(state, 1)
        computed = context.decode(TEXT[200:250], 200, seq=1)
    assert difference(computed, model.expected(TEXT[:250], spec)[200:]) <= EXACT
