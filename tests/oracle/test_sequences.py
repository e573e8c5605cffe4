"""Several sequences: side by side, copied from each other, and with tokens that belong to more than one."""

from __future__ import annotations

import numpy as np
import pytest
from support.native import FULL, STREAMING, Token
from support.oracle import EXACT, difference, random_tokens

SINK, WINDOW = 4, 30
CACHES = pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])


def n_ctx(unified: bool, n_seq: int) -> int:
    return 2048 if unified else 1024 * n_seq


@pytest.mark.slow
@CACHES
@pytest.mark.parametrize("family", ["llama", "smollm3"])
@pytest.mark.parametrize("n_ubatch", [8, 64])
def test_side_by_side(subject, measured, family, unified, n_ubatch):
    """Three prompts of different lengths read in turns, then decoded together past the window."""
    model = subject(family)
    spec = model.spec(SINK, WINDOW)
    texts = [random_tokens(n, seed=n) for n in (420, 300, 130)]
    with model.context(spec, n_ctx=n_ctx(unified, 3), n_batch=512, n_ubatch=n_ubatch, n_seq_max=3, kv_unified=unified) as context:
        computed = [[] for _ in texts]
        for start, size in [(0, 100), (100, 25)] + [(125 + i, 1) for i in range(300)]:
            batch = [
                Token(int(token), start + i, (seq,))
                for seq, text in enumerate(texts)
                for i, token in enumerate(text[start : start + size])
            ]
            for token, row in zip(batch, context.decode_batch(batch)):
                computed[token.seqs[0]].append(row)
    for text, rows in zip(texts, computed):
        measured(family, "parallel sequences", difference(np.stack(rows), model.expected(text, spec)), EXACT)


@pytest.mark.slow
@CACHES
@pytest.mark.parametrize("n_seq", [2, 4])
@pytest.mark.parametrize("layers", [[0, 2], range(4)], ids=["half", "all"])
def test_a_copied_prompt_longer_than_the_window(subject, measured, unified, n_seq, layers):
    """One prompt, copied to all sequences, then each goes on with another text until its window is all its own."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, layers)
    prompt, n_more = random_tokens(350), 90
    texts = [np.concatenate([prompt, random_tokens(n_more, seed=seq + 1)]) for seq in range(n_seq)]
    with model.context(spec, n_ctx=n_ctx(unified, n_seq), n_batch=512, n_ubatch=32, n_seq_max=n_seq, kv_unified=unified) as context:
        context.decode(prompt)
        for seq in range(1, n_seq):
            context.seq_cp(0, seq)
        computed = []
        for i in range(n_more):
            turn = [Token(int(text[350 + i]), 350 + i, (seq,)) for seq, text in enumerate(texts)]
            computed.append(context.decode_batch(turn))
        for seq in range(n_seq):
            assert context.positions(FULL, seq) == list(range(440))
            assert set(context.positions(STREAMING, seq)) >= {*range(SINK), *range(441 - WINDOW, 440)}
    for seq, text in enumerate(texts):
        expected = model.expected(text, spec)[350:]
        measured("llama", "copied sequences", difference(np.stack(computed)[:, seq], expected), EXACT)


@pytest.mark.parametrize("n_seq", [2, 4])
def test_tokens_of_several_sequences(subject, measured, n_seq):
    """A prompt whose tokens belong to all sequences at once: what llama-batched does with a shared prompt."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW)
    prompt = random_tokens(300)
    everyone = tuple(range(n_seq))
    with model.context(spec, n_ctx=1024, n_batch=512, n_ubatch=16, n_seq_max=n_seq, kv_unified=True) as context:
        context.decode_batch(Token(int(token), i, everyone) for i, token in enumerate(prompt))
        for seq in everyone:
            more = random_tokens(70, seed=seq + 1)
            computed = context.decode_one_by_one(more, len(prompt), seq)
            expected = model.expected(np.concatenate([prompt, more]), spec)[len(prompt) :]
            measured("llama", "copied sequences", difference(computed, expected), EXACT)


def test_a_sequence_alone_after_its_copies_are_gone(subject):
    """Cells that were shared are given back when the last holder goes, and sinks never are."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW)
    text = random_tokens(900)
    with model.context(spec, n_ctx=1024, n_batch=512, n_ubatch=16, n_seq_max=4, kv_unified=True) as context:
        context.decode(text[:200])
        for seq in (1, 2, 3):
            context.seq_cp(0, seq)
        context.seq_keep(2)
        computed = context.decode(text[200:], 200, seq=2)
        assert context.positions(FULL, 0) == context.positions(STREAMING, 0) == []
        assert context.positions(STREAMING, 2)[:SINK] == list(range(SINK))
    assert difference(computed, model.expected(text, spec)[200:]) <= EXACT


@CACHES
def test_a_full_cache_is_reported_and_changes_nothing(subject, unified):
    from support.native import DecodeError

    model = subject("llama")
    spec = model.spec(SINK, WINDOW)
    text = random_tokens(600)
    with model.context(spec, n_ctx=512, n_batch=512, n_ubatch=32, kv_unified=unified) as context:
        context.decode(text[:500])
        held = context.positions(FULL), context.positions(STREAMING)
        with pytest.raises(DecodeError) as failure:
            context.decode(text[500:513], 500)
        assert failure.value.code == 1  # no slot found, as for any llama.cpp cache
        assert (context.positions(FULL), context.positions(STREAMING)) == held
        computed = context.decode(text[500:512], 500)
    assert difference(computed, model.expected(text[:512], spec)[500:]) <= EXACT
