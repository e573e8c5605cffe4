"""Context shift and the rewinds that a streaming layer can and can't answer for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.native import FULL, PARTIAL, STREAMING, DecodeError
from support.oracle import EXACT, RELATIVE, Subject, difference, random_tokens
from support.reference import NumpyLlama
from support.refusals import refuse_shift

from lt_gguf.spec import StreamingSpec

SINK, WINDOW = 6, 40
LAYERS = pytest.mark.parametrize("layers", [[1, 2], range(4)], ids=["half", "all"])


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize("n_keep, n_discard", [(SINK, 30), (SINK, 250), (SINK, 420), (20, 320), (20, 375), (100, 250)])
def test_context_shift(subject, measured, layers, n_keep, n_discard):
    """Three shifts, as llama.cpp's tools make them; the discarded part may reach into the window."""
    model = subject("llama")
    worst = error_of_shifts(model, model.spec(SINK, WINDOW, layers), n_keep, n_discard)
    measured("llama", "context shift", worst, EXACT, layers=list(layers), n_keep=n_keep, n_discard=n_discard)


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize("kv, flash", [("f16", False), ("f16", True), ("q8_0", True), ("q4_0", True)])
def test_context_shift_of_smaller_types(subject, measured, layers, kv, flash):
    """With a quantized K llama.cpp dequantizes, turns and quantizes again: compared with the full model's error."""
    model = subject("llama-mha")
    full = error_of_shifts(model, model.spec(SINK, WINDOW, []), 20, 250, kv=kv, flash=flash)
    hybrid = error_of_shifts(model, model.spec(SINK, WINDOW, layers), 20, 250, kv=kv, flash=flash)
    measured("llama-mha", f"context shift, {kv} KV", hybrid, RELATIVE * full, full=full, flash=flash)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[], [1, 2]], ids=["none", "half"])
def test_context_shift_of_layers_that_are_kept(subject, measured, layers):
    """In 16 bits in a quantized cache: with heads of 64 their keys are rotated, too, and turned back to be shifted."""
    model = subject("llama-mha")
    spec = model.spec(SINK, WINDOW, layers)
    full = error_of_shifts(model, spec, 20, 250, kv="f16", flash=True)
    kept = error_of_shifts(model, replace(spec, cache_keep=tuple(range(4))), 20, 250, kv="q4_0", flash=True)
    measured("llama-mha", "context shift, layers kept in f16", kept, RELATIVE * full, full=full, layers=layers)


def error_of_shifts(model: Subject, spec: StreamingSpec, n_keep: int, n_discard: int, **settings) -> float:
    conversation = NumpyLlama(model.hf, spec).conversation()
    n_past, n_tokens = 0, 0
    worst = 0.0
    with model.context(spec, n_ctx=512, n_batch=512, n_ubatch=32, **settings) as context:
        assert context.can_shift()
        for _ in range(3):
            text = random_tokens(440 - n_past, seed=n_tokens)
            positions = range(n_past, 440)
            worst = max(worst, difference(context.decode(text, n_past), conversation.decode(text, positions)))
            n_tokens += len(text)
            assert context.seq_rm(0, n_keep, n_keep + n_discard)
            context.seq_add(0, n_keep + n_discard, -1, -n_discard)
            n_past = 440 - n_discard
            conversation.entries = [
                entry if entry.pos < n_keep else entry.at(entry.pos - n_discard)
                for entry in conversation.entries
                if not n_keep <= entry.pos < n_keep + n_discard
            ]
            more = random_tokens(20, seed=n_tokens + 1)
            worst = max(
                worst, difference(context.decode_one_by_one(more, n_past), conversation.decode(more, range(n_past, n_past + 20)))
            )
            n_past += 20
    return worst


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize(
    "n_keep, n_discard",
    [(0, 200), (1, 200), (SINK - 1, 200), (100, 480)],
    ids=["no-sink", "one-sink", "a-sink-less", "kept-tokens-in-the-window"],
)
def test_a_shift_that_needs_what_was_dropped_is_refused(subject, layers, n_keep, n_discard):
    """Fewer tokens kept than there are sinks, or so many discarded that kept ones come into the window again."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers)
    text = random_tokens(600)
    with model.context(spec, n_ctx=1024, n_batch=512, n_ubatch=32, n_seq_max=2, kv_unified=True) as context:
        context.decode(text[:300], seq=1)
        context.decode(text[:600])
        refuse_shift(context, n_keep, n_discard)
        # the other sequence goes on, and this one can be processed again
        context.decode(text[300:320], 300, seq=1)
        assert context.seq_rm(0, -1, -1)
        assert difference(context.decode(text[:400]), model.expected(text[:400], spec)) <= EXACT


@pytest.mark.slow
@LAYERS
def test_rewinding(subject, measured, layers):
    """seq_rm succeeds exactly where what remains is complete, and then the answers are those of a fresh context."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers)
    text, other = random_tokens(700), random_tokens(700, seed=1)
    n_refused = n_done = 0
    for back in (1, 2, WINDOW - 1, WINDOW, 100, 200, 300, 640, 690, 697, 700):
        with model.context(spec, n_ctx=1024, n_batch=512, n_ubatch=32) as context:
            context.decode(text)
            kept = 700 - back
            held = context.positions(STREAMING)
            complete = all(p in held for p in range(kept) if spec.visible(kept, p))
            assert context.seq_rm(0, kept, -1) == complete
            if complete:
                n_done += 1
                new = np.concatenate([text[:kept], other[:50]])
                computed = context.decode(other[:50], kept)
                measured("llama", "rewind", difference(computed, model.expected(new, spec)[kept:]), EXACT, back=back)
            else:
                n_refused += 1
                assert context.pos_min() > kept - WINDOW
                assert context.positions(STREAMING) == held and context.pos_max() == 699
                computed = context.decode(other[:5], 700)
                expected = model.expected(np.concatenate([text, other[:5]]), spec)[700:]
                measured("llama", "rewind", difference(computed, expected), EXACT, back=back)
    assert n_refused >= 3 and n_done >= 5  # to the very start and into the sinks it can always be rewound


@LAYERS
def test_rewinding_to_the_edge_of_what_is_held(subject, layers):
    """One token further than the first position that needs nothing dropped is one too far."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers)
    text, other = random_tokens(500), random_tokens(60, seed=1)
    with model.context(spec, n_ctx=1024, n_batch=512, n_ubatch=32) as context:
        context.decode(text)
        edge = context.pos_min() - 1 + WINDOW  # its window begins just after the last dropped position
        assert edge < 500 and not context.seq_rm(0, edge - 1, -1)
        assert context.seq_rm(0, edge, -1)
        computed = context.decode(other, edge)
    expected = model.expected(np.concatenate([text[:edge], other]), spec)[edge:]
    assert difference(computed, expected) <= EXACT


def test_self_extend_positions(subject):
    """seq_div, as self-extend uses it: positions in groups of two, of which the window then sees twice as many."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, [1, 3])
    conversation = NumpyLlama(model.hf, spec).conversation()
    text = random_tokens(120)
    with model.context(spec, n_ctx=512, n_ubatch=32) as context:
        context.decode(text[:30])
        conversation.decode(text[:30], range(30))
        context.seq_div(0, 10, 30, 2)
        conversation.entries = [entry.at(entry.pos // 2) if 10 <= entry.pos < 30 else entry for entry in conversation.entries]
        start = conversation.entries[-1].pos + 1
        computed = context.decode(text[30:], start)
        assert difference(computed, conversation.decode(text[30:], range(start, start + 90))) <= EXACT


def test_a_shift_of_cells_that_the_parts_share_differently_is_refused(subject):
    """A checkpoint restored into a copied sequence gives it streaming cells of its own; its full cells are still shared."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, [1, 2])
    text = random_tokens(120)
    with model.context(spec, n_ctx=1024, n_ubatch=32, n_seq_max=2, kv_unified=True) as context:
        context.decode(text[:100], seq=1)
        checkpoint = context.save_seq(1, PARTIAL)
        context.seq_cp(1, 0)
        assert context.restore_seq(checkpoint, 0, PARTIAL)
        assert context.seq_rm(0, 20, 30)
        context.seq_add(0, 30, -1, -10)
        with pytest.raises(DecodeError):
            context.decode([5], 100, seq=0)
        for part in (FULL, STREAMING):
            assert context.positions(part, 1)[-WINDOW:] == list(range(100 - WINDOW, 100))
        computed = context.decode(text[100:], 100, seq=1)
    assert difference(computed, model.expected(text, spec)[100:]) <= EXACT
