"""`prefill = full` for several sequences: in all phases at once, copied from each other, and with common tokens."""

from __future__ import annotations

import numpy as np
import pytest
from support.native import FULL, PROMPT, STREAMING, Context, Token
from support.oracle import EXACT, random_tokens
from support.transcript import Transcript

SINK, WINDOW = 4, 40
CACHES = pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])
LAYERS = pytest.mark.parametrize("layers", [[0, 2], range(4)], ids=["half", "all"])


def context_of(model, spec, unified: bool, n_seq: int, **settings) -> Context:
    n_ctx = 2048 if unified else 1024 * n_seq
    settings = dict(n_batch=1024, n_ubatch=32) | settings
    return model.context(spec, n_ctx=n_ctx, n_seq_max=n_seq, kv_unified=unified, **settings)


def decode_together(context: Context, parts: list[tuple[Transcript, int, list[bool]]], in_turns: bool = False) -> None:
    """One batch of tokens of several sequences, one after the other or in turns."""
    batches = [transcript.batch(n, wanted) for transcript, n, wanted in parts]
    if in_turns:
        batch = [b[i] for i in range(max(map(len, batches), default=0)) for b in batches if i < len(b)]
    else:
        batch = [token for b in batches for token in b]
    rows = context.decode_batch(batch)
    for transcript, _, _ in parts:
        transcript.record(batch, rows)
        assert context.in_prompt(transcript.seq) == transcript.in_prompt


def part_of_a_prompt(n: int, end: bool) -> list[bool]:
    return [False] * (n - 1) + [end] if n > 1 or end else [False]


@pytest.mark.slow
@CACHES
@LAYERS
@pytest.mark.parametrize("n_ubatch", [8, 64])
def test_one_reads_while_others_decode(subject, measured, unified, layers, n_ubatch):
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers, prefill="full")
    with context_of(model, spec, unified, 3, n_ubatch=n_ubatch) as context:
        reader, first, second = (Transcript(model, spec, context, seq) for seq in range(3))
        first.read(330)
        second.read(20)
        for step in range(10):
            end = step == 9
            parts = [(first, 1, [True]), (reader, 55, part_of_a_prompt(55, end)), (second, 4, [True] * 4)]
            decode_together(context, parts, in_turns=step % 2 == 1)
        for _ in range(20):
            decode_together(context, [(t, 1, [True]) for t in (reader, first, second)])
        assert context.positions(STREAMING, 0)[SINK] >= 550 - WINDOW
        for transcript in (reader, first, second):
            measured("llama", "prefill = full, parallel sequences", transcript.difference(), EXACT)


@pytest.mark.slow
@CACHES
@LAYERS
@pytest.mark.parametrize("in_turns", [False, True], ids=["one-after-the-other", "in-turns"])
def test_two_prompts_at_once(subject, measured, unified, layers, in_turns):
    """Of different lengths: one ends while the other goes on, and one begins while the other is being read."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers, prefill="full")
    with context_of(model, spec, unified, 2) as context:
        a, b = (Transcript(model, spec, context, seq) for seq in range(2))
        a.read(150, end=False)
        decode_together(context, [(a, 200, [False] * 200), (b, 300, [False] * 300)], in_turns)
        decode_together(context, [(a, 50, part_of_a_prompt(50, True)), (b, 100, [False] * 100)], in_turns)
        decode_together(context, [(a, 1, [True]), (b, 100, part_of_a_prompt(100, True))], in_turns)
        for _ in range(50):
            decode_together(context, [(a, 1, [True]), (b, 1, [True])], in_turns)
        assert context.kv_bytes(PROMPT) == 0
        for transcript in (a, b):
            measured("llama", "prefill = full, parallel sequences", transcript.difference(), EXACT)


@pytest.mark.slow
@CACHES
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", ["llama", "smollm3"])
def test_random_mixtures_of_phases(subject, measured, family, unified, seed):
    random = np.random.default_rng(seed)
    model = subject(family)
    n_seq = 3
    spec = model.spec(SINK, WINDOW, seed=seed, prefill="full")
    with context_of(model, spec, unified, n_seq, n_ubatch=int(random.choice([8, 32, 200]))) as context:
        transcripts = [Transcript(model, spec, context, seq, seed) for seq in range(n_seq)]
        for _ in range(24):
            parts = []
            for transcript in transcripts:
                what = random.choice(["rest", "token", "token", "draft", "part", "last part", "long part", "few of it"])
                n = {"rest": 0, "token": 1, "draft": 7, "long part": 180}.get(what, int(random.integers(1, 70)))
                if n and len(transcript) + n <= 640:
                    wanted = np.full(n, what in ("token", "draft"))
                    if what == "few of it":
                        wanted = random.random(n) < 0.2
                    wanted[-1] |= what == "last part"
                    parts.append((transcript, n, wanted.tolist()))
            if parts:
                decode_together(context, parts, in_turns=bool(random.integers(2)))
        for transcript in transcripts:
            assert any(end - begin > 100 for begin, end in transcript.prompts)
            measured(family, "prefill = full, parallel sequences", transcript.difference(), EXACT, seed=seed)


@pytest.mark.slow
@CACHES
@LAYERS
@pytest.mark.parametrize("n_prompt", [30, 400])
@pytest.mark.parametrize("where", ["after a prompt", "in a prompt", "after an answer"])
def test_copied(subject, measured, unified, layers, where, n_prompt):
    """A copy goes on with another text, and the original with its own, each from where it was."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers, prefill="full")
    with context_of(model, spec, unified, 3) as context:
        original = Transcript(model, spec, context)
        original.read(n_prompt, n_batch=150, end=where != "in a prompt")
        if where == "after an answer":
            original.decode(20)
        transcripts = [original]
        for seq in (1, 2):
            context.seq_cp(0, seq)
            transcripts.append(original.copy(seq))
            assert context.in_prompt(seq) == (where == "in a prompt")
            assert context.positions(STREAMING, seq) == context.positions(STREAMING, 0)
        original.read(25, most=True)
        transcripts[1].decode(25, together=5)
        transcripts[2].read(200, n_batch=90, most=True)
        for _ in range(50):
            decode_together(context, [(t, 1, [True]) for t in transcripts])
        for transcript in transcripts:
            measured("llama", "prefill = full, copied sequences", transcript.difference(), EXACT)


@CACHES
def test_a_copy_outlives_the_original(subject, unified):
    """In a prompt's middle: what the copy holds isn't given back with the original."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, range(4), prefill="full")
    with context_of(model, spec, unified, 2) as context:
        original = Transcript(model, spec, context)
        original.read(400, n_batch=150, end=False)
        context.seq_cp(0, 1)
        copied = original.copy(1)
        assert context.seq_rm(0, -1, -1)
        other = Transcript(model, spec, context, 0, seed=3)
        other.read(200)
        assert context.positions(STREAMING, 1) == list(range(400))
        copied.read(100)
        copied.decode(30)
        other.decode(30)
        assert copied.difference() <= EXACT and other.difference() <= EXACT


@pytest.mark.parametrize("n_prompt", [50, 350])
@pytest.mark.parametrize("n_seq", [2, 4])
def test_a_prompt_whose_tokens_belong_to_all(subject, measured, n_seq, n_prompt):
    """What llama-batched does with a shared prompt; then each answers for itself, and reads a message of its own."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, prefill="full")
    everyone = tuple(range(n_seq))
    with context_of(model, spec, True, n_seq, n_ubatch=16) as context:
        transcripts = [Transcript(model, spec, context, seq, seed=seq) for seq in everyone]
        prompt = random_tokens(n_prompt)
        rows = context.decode_batch(Token(int(t), i, everyone, i == n_prompt - 1) for i, t in enumerate(prompt))
        for transcript in transcripts:
            transcript.tokens, transcript.prompts = prompt.tolist(), [(0, n_prompt)]
            transcript.rows[n_prompt - 1] = rows[0]
            assert not context.in_prompt(transcript.seq)
            assert context.positions(FULL, transcript.seq) == list(range(n_prompt))
        # what all have is held once: for each one more it would be some 22 kB in each streaming layer
        assert len(context.save()) < len(context.save_seq(0)) + 15_000
        for turn in range(60):
            decode_together(context, [(t, 1, [True]) for t in transcripts])
            if turn == 30:
                transcripts[1].read(70, most=True)
        for transcript in transcripts:
            measured("llama", "prefill = full, copied sequences", transcript.difference(), EXACT)


@CACHES
def test_rewinding_one_sequence_leaves_the_others_prompts(subject, unified):
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, [1, 3], prefill="full")
    with context_of(model, spec, unified, 2) as context:
        a, b = (Transcript(model, spec, context, seq) for seq in range(2))
        a.read(300, end=False)
        b.read(300)
        b.decode(30)
        assert b.rewind(310) and a.rewind(200)
        assert context.in_prompt(0) and not context.in_prompt(1)
        b.decode(5)
        a.read(150)
        a.decode(5)
        assert context.seq_rm(1, -1, -1)
        a.decode(50)
        assert a.difference() <= EXACT and b.difference() <= EXACT
