"""Models whose layers have a sliding window of their own, but for some: these stream, and the others stay what they are."""

from __future__ import annotations

import numpy as np
import pytest
from support.families import OWN_WINDOW, SLIDING_FAMILIES
from support.native import FULL, PROMPT, STREAMING, SWA, C, Token, api
from support.oracle import EXACT, RELATIVE, Subject, difference, random_tokens
from support.transcript import Transcript

SINK, N_UBATCH = 4, 32
WINDOWS = pytest.mark.parametrize("window", [20, OWN_WINDOW, 130], ids=["shorter", "equal", "longer"])
FAMILY = pytest.mark.parametrize("family", SLIDING_FAMILIES)
PREFILL = pytest.mark.parametrize("prefill", ["stream", "full"])
CACHES = pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])

# ("read", tokens, batch size or None for one batch), ("decode", tokens, how many at once)
CHAT = [("read", 420, 100), ("decode", 30, 1), ("read", 9, None), ("decode", 80, 1), ("read", 250, None), ("decode", 48, 8)]


def run(transcript: Transcript, turns=CHAT) -> Transcript:
    for kind, n, size in turns:
        if kind == "read":
            transcript.read(n, size, most=True)
        else:
            transcript.decode(n, size)
    return transcript


def error(model: Subject, spec, turns=CHAT, **settings) -> float:
    with model.context(spec, **dict(n_ctx=1024, n_ubatch=N_UBATCH, swa_full=False) | settings) as context:
        return run(Transcript(model, spec, context), turns).difference()


@FAMILY
def test_the_layers_that_may_stream(subject, family):
    """The runtime and transformers agree which these are; `all` means them, and no other can be flagged."""
    model: Subject = subject(family)
    may = model.may_stream
    assert api().may_stream(model.native.handle) == tuple(may) and 2 <= len(may) < model.n_layer
    with model.context("layers=all") as context:
        assert context.streaming().startswith(f"layers={','.join(map(str, may))};")
    own = next(il for il in range(model.n_layer) if il not in may)
    reason = rf"layers = {{{own}: true}}: must be true for layers with full attention only, which are {may[0]},"
    with pytest.raises(ValueError, match=reason):
        model.native.set_streaming(f"layers={own},{may[0]}")


@pytest.mark.slow
@FAMILY
@PREFILL
@WINDOWS
def test_conversation(subject, measured, family, prefill, window):
    model: Subject = subject(family)
    spec = model.spec(SINK, window, prefill=prefill)
    measured(family, f"own windows, prefill = {prefill}", error(model, spec), EXACT, spec=str(spec))


@FAMILY
@PREFILL
def test_every_layer_that_may_streams(subject, measured, family, prefill):
    model: Subject = subject(family)
    spec = model.spec(0, 33, model.may_stream, prefill=prefill)
    worst = error(model, spec)
    measured(family, f"own windows, all others streaming, prefill = {prefill}", worst, EXACT)


@pytest.mark.slow
@FAMILY
def test_the_oracle_notices_one_key_too_many(subject, family):
    """In the streaming layers, and in those that have a window of their own."""
    model: Subject = subject(family)
    tokens = random_tokens(300)
    expected = model.expected(tokens, model.spec(SINK, 60, model.may_stream))
    for other in (model.spec(SINK + 1, 60, model.may_stream), model.spec(SINK, 61, model.may_stream)):
        assert difference(expected, model.expected(tokens, other)) > 5 * EXACT
    config = model.hf.config
    own = [layer.self_attn for layer in model.hf.model.layers]
    config.sliding_window += 1
    try:
        for attention in own:
            attention.sliding_window = attention.sliding_window and config.sliding_window
        wider = model.expected(tokens, model.spec(SINK, 60, model.may_stream))
    finally:
        config.sliding_window -= 1
        for attention in own:
            attention.sliding_window = attention.sliding_window and config.sliding_window
    assert difference(expected, wider) > 5 * EXACT


@pytest.mark.slow
@PREFILL
@pytest.mark.parametrize(
    "n_ubatch", [1, 16, 47, 256 - OWN_WINDOW, 512]
)  # 256 cells hold the window and a micro-batch of the last but one
@pytest.mark.parametrize("n_batch", [1, 7, 48, 49, 199, 400])
def test_every_split(subject, measured, n_batch, n_ubatch, prefill):
    model: Subject = subject("gemma3")
    spec = model.spec(SINK, 60, prefill=prefill)
    turns = [("read", 430, n_batch), ("decode", 3, 1), ("read", 70, n_batch), ("decode", 3, 1)]
    measured("gemma3", "own windows, batch splits", error(model, spec, turns, n_ubatch=n_ubatch), EXACT)


@pytest.mark.slow
@FAMILY
@PREFILL
@pytest.mark.parametrize(
    "kv, flash", [("f32", True), ("f16", False), ("f16", True), ("bf16", True), ("q8_0", True), ("q4_0", True)]
)
def test_error_of_other_types_is_that_of_the_full_model(subject, measured, family, prefill, kv, flash):
    model: Subject = subject(family)
    spec = model.spec(SINK, 60, prefill=prefill)
    full = error(model, None, kv=kv, flash=flash)
    hybrid = error(model, spec, kv=kv, flash=flash)
    measured(family, f"own windows, {kv} KV" + ", flash attention" * flash, hybrid, RELATIVE * full, full=full, spec=str(spec))


@pytest.mark.slow
@FAMILY
@PREFILL
@CACHES
def test_several_sequences(subject, measured, family, prefill, unified):
    """Read and decoded in common batches, past both windows."""
    model: Subject = subject(family)
    spec = model.spec(SINK, 60, prefill=prefill)
    n_ctx = 1024 * (1 if unified else 3)
    with model.context(spec, n_ctx=n_ctx, n_batch=512, n_ubatch=N_UBATCH, n_seq_max=3, kv_unified=unified) as context:
        transcripts = [Transcript(model, spec, context, seq) for seq in range(3)]
        for sizes in ((200, 55, 1), (1, 100, 150), *[(1, 1, 1)] * 60):
            wanted = [[False] * (n - 1) + [True] for n in sizes]
            batches = [transcript.batch(n, logits) for transcript, n, logits in zip(transcripts, sizes, wanted)]
            rows = context.decode_batch([token for batch in batches for token in batch])
            for seq, transcript in enumerate(transcripts):
                first = sum(sum(logits) for logits in wanted[:seq])
                transcript.record(batches[seq], rows[first : first + sum(wanted[seq])])
    for transcript in transcripts:
        measured(family, "own windows, sequences", transcript.difference(), EXACT, unified=unified)


@pytest.mark.slow
@CACHES
@PREFILL
@pytest.mark.parametrize("n_seq", [2, 4])
def test_a_copied_prompt_longer_than_the_windows(subject, measured, unified, n_seq, prefill):
    """Cells that sequences share are used again when all of them have left them behind."""
    model: Subject = subject("cohere2")
    spec = model.spec(SINK, 30, prefill=prefill)
    n_ctx = 2048 if unified else 1024 * n_seq
    with model.context(spec, n_ctx=n_ctx, n_batch=512, n_ubatch=N_UBATCH, n_seq_max=n_seq, kv_unified=unified) as context:
        first = Transcript(model, spec, context)
        first.read(350)
        for seq in range(1, n_seq):
            context.seq_cp(0, seq)
        transcripts = [first, *(first.copy(seq) for seq in range(1, n_seq))]
        for _ in range(110):
            batches = [transcript.batch(1, [True]) for transcript in transcripts]
            for batch, transcript, row in zip(batches, transcripts, context.decode_batch([batch[0] for batch in batches])):
                transcript.record(batch, row[None])
    for transcript in transcripts:
        measured("cohere2", "own windows, copied sequences", transcript.difference(), EXACT, unified=unified)


def test_tokens_of_several_sequences(subject, measured):
    model: Subject = subject("gemma3")
    spec = model.spec(SINK, 30)
    prompt, everyone = random_tokens(300), (0, 1, 2)
    with model.context(spec, n_ctx=1024, n_batch=512, n_ubatch=16, n_seq_max=3, kv_unified=True) as context:
        context.decode_batch(Token(int(token), i, everyone) for i, token in enumerate(prompt))
        for seq in everyone:
            more = random_tokens(120, seed=seq + 1)
            computed = context.decode_one_by_one(more, len(prompt), seq)
            expected = model.expected(np.concatenate([prompt, more]), spec)[len(prompt) :]
            measured("gemma3", "own windows, copied sequences", difference(computed, expected), EXACT)


@pytest.mark.slow
@FAMILY
def test_hiding_is_dropping(subject, measured, family):
    """One context that has read the prompt once, and goes back to its end for each choice, against a hybrid for each."""
    model: Subject = subject(family)
    settings = dict(n_ctx=512, n_batch=64, n_ubatch=N_UBATCH)
    prompt, answer = np.split(random_tokens(280), [240])
    with model.context("hide=none", **settings) as one:
        one.read_prompt(prompt)
        for layers, sink, window in (
            (model.may_stream, 4, 40),
            (model.may_stream[:1], 0, 64),
            (model.may_stream[1:], 6, 16),
            ((), 4, 40),
        ):
            spec = model.spec(sink, window, layers, prefill="full")
            api().context_hide(one.handle, spec)
            found = one.decode_one_by_one(answer, 240)
            assert one.seq_rm(0, 240, -1)
            with model.context(spec, **settings) as hybrid:
                hybrid.read_prompt(prompt)
                expected = hybrid.decode_one_by_one(answer, 240)
            measured(family, "own windows, hidden instead of dropped", difference(found, expected), EXACT)
        assert one.seq_rm(0, 20, -1)  # all is kept, in all layers: back to where another prompt goes another way
        other = np.concatenate([prompt[:20], random_tokens(100, seed=1)])
        found = one.read_prompt(other[20:], 20)
    with model.context(None, **settings) as full:
        assert difference(found, full.read_prompt(other)) <= EXACT


@FAMILY
def test_tokens_that_look_ahead(subject, measured, family):
    """As those of an image do, in some models in the layers with a window only: with nothing to drop, as in llama.cpp itself."""
    model: Subject = subject(family)
    tokens = random_tokens(100)
    rows = []
    for spec in (None, model.spec(SINK, 5000, model.may_stream)):
        with model.context(spec, n_ctx=512, swa_full=False) as context:
            C.llama_set_causal_attn(context.handle, False)
            rows.append(context.decode(tokens))
    measured(family, "own windows, looking ahead", difference(*rows), EXACT)
    assert difference(rows[0], model.expected(tokens, None)) > 5 * EXACT


def test_what_the_parts_hold_and_take(subject):
    """Each layer's tokens are in its own part, and `swa_full`, which is llama.cpp's default, makes none larger."""
    model: Subject = subject("gemma3")
    spec = model.spec(SINK, 60, model.may_stream[:1], prefill="full")
    a_cell = 2 * 2 * 64 * 4  # K and V, KV heads, their size, f32
    for swa_full in (True, False):
        with model.context(spec, n_ctx=1024, n_ubatch=N_UBATCH, swa_full=swa_full) as context:
            run(Transcript(model, spec, context))
            assert [context.kv_cells(part) for part in (FULL, STREAMING, SWA)] == [1024, 256, 256]
            layers = {FULL: 1, STREAMING: 1, SWA: 10}
            for part, n in layers.items():
                assert context.kv_bytes(part) == n * context.kv_cells(part) * a_cell
            assert context.kv_bytes(PROMPT) == 0
            assert context.positions(FULL) == list(range(837))
            assert set(context.positions(SWA)) >= set(range(837 - OWN_WINDOW + 1, 837))
