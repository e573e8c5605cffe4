"""Contexts that only hide what streaming layers would have dropped: one prompt for many hybrids, of each the same logits."""

from __future__ import annotations

import numpy as np
import pytest
from support.native import FULL, PROMPT, STREAMING, Token, api
from support.oracle import EXACT, RELATIVE, Subject, difference, random_tokens

N_PROMPT, N_ANSWER, N_SECOND = 150, 12, 30
SPECS = [((1, 2), 4, 40), ((0,), 0, 64), (range(4), 6, 16), ((), 4, 40), ((3,), 4, 300)]
SETTINGS = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 32}


def hide(context, spec) -> None:
    api().context_hide(context.handle, spec)


def turns(seed: int = 0) -> tuple[np.ndarray, ...]:
    """A prompt, its answer, a second message and its answer."""
    text = random_tokens(N_PROMPT + N_ANSWER + N_SECOND + N_ANSWER, seed)
    return tuple(np.split(text, np.cumsum([N_PROMPT, N_ANSWER, N_SECOND])))


def read_conversation(context, parts, seq: int = 0, skip: int = 0) -> np.ndarray:
    """The logits of the prompts' ends and of the answers' tokens; the first `skip` parts are there already."""
    rows, n_past = [], sum(map(len, parts[:skip]))
    for i, part in list(enumerate(parts))[skip:]:
        rows.append(context.decode(part, n_past, seq) if i % 2 else context.read_prompt(part, n_past, seq))
        n_past += len(part)
    return np.concatenate(rows)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_one_prompt_serves_all_hybrids(subject, measured, family):
    """Each hybrid in a context of its own, against one context that has read the prompt once."""
    model: Subject = subject(family)
    parts = turns()
    worst = 0.0
    with model.context("hide=none", **SETTINGS) as one:
        one.read_prompt(parts[0])
        for layers, sink, window in SPECS:
            spec = model.spec(sink, window, layers, prefill="full")
            hide(one, spec)
            found = read_conversation(one, parts, skip=1)
            assert one.seq_rm(0, N_PROMPT, -1)
            with model.context(spec, **SETTINGS) as hybrid:
                expected = read_conversation(hybrid, parts)[1:]
            worst = max(worst, difference(found, expected))
    measured(family, "hidden instead of dropped", worst, EXACT)


@pytest.mark.parametrize("kv, flash", [("f16", True), ("f16", False), ("q8_0", True)])
def test_other_cache_types(subject, measured, kv, flash):
    """As near to the hybrid as two computations of the full model with other cells are to each other."""
    model: Subject = subject("llama")
    parts, spec = turns(1), model.spec(4, 40, (0, 2), prefill="full")
    settings = SETTINGS | {"kv": kv, "flash": flash}
    with (
        model.context("hide=none", **settings) as one,
        model.context(spec, **settings) as hybrid,
        model.context(None, **settings) as full,
    ):
        one.read_prompt(parts[0])
        hide(one, spec)
        found = read_conversation(one, parts, skip=1)
        expected, other = read_conversation(hybrid, parts)[1:], read_conversation(full, parts)[1:]
    text = np.concatenate(parts)
    error = difference(other, model.expected(text, None)[N_PROMPT:][answer_rows()])
    measured("llama", f"hidden, {kv} KV", difference(found, expected), RELATIVE * error, flash=flash)
    assert difference(found, other) > 10 * difference(found, expected)  # the hybrid is another model


def answer_rows() -> np.ndarray:
    """Of the rows behind the prompt, those that `read_conversation` gives: all but a second message before its end."""
    rows = np.arange(N_ANSWER + N_SECOND + N_ANSWER)
    return rows[(rows < N_ANSWER) | (rows >= N_ANSWER + N_SECOND - 1)]


def test_prompts_that_are_read_as_a_stream(subject, measured):
    """`prefill = stream` hides while the prompt is read, too, so it has to be read for each hybrid."""
    model: Subject = subject("llama")
    parts, spec = turns(2), model.spec(4, 40, (1, 3))
    with model.context("hide=none", **SETTINGS) as one, model.context(spec, **SETTINGS) as hybrid:
        hide(one, spec)
        worst = difference(read_conversation(one, parts), read_conversation(hybrid, parts))
    measured("llama", "hidden, prefill = stream", worst, EXACT)


@pytest.mark.parametrize("unified", [True, False])
def test_several_sequences(subject, measured, unified):
    """Each sees its own past, whatever the others have, and whichever reads a prompt meanwhile."""
    model: Subject = subject("llama")
    spec = model.spec(4, 40, (1, 2), prefill="full")
    settings = SETTINGS | {"n_ctx": 1024, "n_seq_max": 2, "kv_unified": unified}
    first, second = turns(3), turns(4)
    with model.context("hide=none", **settings) as one:
        hide(one, spec)
        rows = [read_conversation(one, first[:2], 0), read_conversation(one, second, 1)]
        rows.append(read_conversation(one, first, 0, skip=2))
    worst = 0.0
    for parts, found in ((first, np.concatenate([rows[0], rows[2]])), (second, rows[1])):
        with model.context(spec, **SETTINGS) as hybrid:
            worst = max(worst, difference(found, read_conversation(hybrid, parts)))
    measured("llama", "hidden, two sequences", worst, EXACT, unified=unified)


def test_conversations_that_share_a_prompt(subject, measured):
    """One prompt that is copied to other sequences, which go on in the same batches."""
    model: Subject = subject("llama")
    spec, n = model.spec(4, 40, (0, 2, 3), prefill="full"), 3
    prompt, *conversations = turns(5)[0], *(turns(6 + i)[1:] for i in range(n))
    with model.context("hide=none", **SETTINGS | {"n_seq_max": n, "kv_unified": True}) as one:
        one.read_prompt(prompt)
        for seq in range(1, n):
            one.seq_cp(0, seq)
        hide(one, spec)
        rows = [
            one.decode_batch(
                Token(int(token), N_PROMPT + sum(map(len, parts[:turn])) + i, (seq,), turn != 1 or i == N_SECOND - 1)
                for seq, parts in enumerate(conversations)
                for i, token in enumerate(parts[turn])
            )
            for turn in range(3)
        ]
    worst = 0.0
    for seq, parts in enumerate(conversations):
        found = np.concatenate([np.split(of_turn, n)[seq] for of_turn in rows])
        with model.context(spec, **SETTINGS) as hybrid:
            worst = max(worst, difference(found, read_conversation(hybrid, (prompt, *parts))[1:]))
    measured("llama", "hidden, a shared prompt", worst, EXACT)


def test_everything_is_kept(subject):
    """What the parts hold and take: all of it in the full one, for as long as the context lives."""
    model: Subject = subject("llama")
    parts = turns()
    with model.context("hide=all;sink=4;window=40", **SETTINGS) as one, model.context(None, **SETTINGS) as full:
        read_conversation(one, parts)
        assert api().seq_positions(one.handle, FULL, 0) == list(range(sum(map(len, parts))))
        assert api().kv_bytes(one.handle, FULL) == api().kv_bytes(full.handle, FULL)
        assert api().kv_bytes(one.handle, STREAMING) == api().kv_bytes(one.handle, PROMPT) == 0
        assert one.seq_rm(0, 20, -1)  # a streaming layer would have dropped it


def test_the_context_says_what_it_hides(subject):
    model: Subject = subject("llama")
    with model.context("hide=none", **SETTINGS) as one:
        hide(one, model.spec(2, 50, (1, 3), prefill="full"))
        assert api().context_spec(one.handle) == "hide=1,3;sink=2;window=50;prefill=full"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("layers=1", 'hide = "layers=1": must be a spec of the form hide=1,3,5-9'),
        ("hide=9", 'hide = "9": must be "all", "none", or layers and ranges of layers from 0 to 3'),
        ("hide=1;layers=2", "hide: can't be given with layers"),
        ("hide=1;auto=0.5", "hide: can't be given with auto"),
        ("off", 'hide = "off": must be a spec'),
    ],
)
def test_what_cannot_be_hidden_is_refused(subject, text, reason):
    model: Subject = subject("llama")
    with model.context("hide=2", **SETTINGS) as one:
        with pytest.raises(ValueError, match="^" + reason.replace("(", r"\(")):
            api().context_hide_text(one.handle, text)
        assert api().context_spec(one.handle).startswith("hide=2;")


@pytest.mark.parametrize("spec", [None, "layers=1", "auto=0.5"])
def test_other_contexts_hide_nothing(subject, spec):
    model: Subject = subject("llama")
    with (
        model.context(spec, **SETTINGS) as other,
        pytest.raises(ValueError, match="can't hide, it must be made with a spec as hide=none"),
    ):
        api().context_hide_text(other.handle, "hide=1")
