"""`auto=…` where the first prompt isn't simply read: rewinds, failures and shifts before and after the choice."""

from __future__ import annotations

import re

import numpy as np
import pytest
from support.lazy import laziest, lazy_ratios
from support.native import FULL, STREAMING, DecodeError
from support.oracle import EXACT, EXACT_RATIO, difference, random_tokens
from support.reference import NumpyLlama
from support.transcript import OPEN, Transcript

from lt_gguf.spec import StreamingSpec, parse_layers

SINK, WINDOW, W_LAST = 4, 40, 32
AUTO = f"auto=0.5;sink={SINK};window={WINDOW};w_last={W_LAST};lazy=min"


@pytest.fixture
def chat(subject):
    model = subject("llama")
    with model.context(AUTO, n_ctx=1024, n_batch=1024, n_ubatch=32) as context:
        yield Transcript(model, None, context)


def chosen(context) -> tuple[int, ...]:
    return parse_layers(re.search(r"layers=([^;]*)", context.streaming())[1], context.model.n_layer)


def expect_choice(chat: Transcript, n_queries: int = W_LAST) -> None:
    """The layers are those of plain softmax over all that the sequence holds; then it answers as such a hybrid does."""
    ratios = lazy_ratios(chat.subject.hf, np.array(chat.tokens), SINK, WINDOW, n_queries, "min")
    np.testing.assert_allclose(chat.context.lazy_ratios(), ratios, rtol=0, atol=EXACT_RATIO)
    assert chosen(chat.context) == laziest(ratios, 0.5)
    assert chat.difference() <= EXACT
    # all layers were full so far: for transformers one prompt, whatever it was
    chat.rows, chat.prompts = {}, [(0, len(chat))]
    chat.spec = StreamingSpec(chosen(chat.context), 4, SINK, WINDOW, "full")
    chat.decode(60)
    chat.read(30, most=True)
    assert chat.difference() <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("end", [299, 290, 280, 200, 31, 1])
@pytest.mark.parametrize("n_more", [1, 5, 100])
def test_removed_queries_do_not_count(chat, end, n_more):
    """They are those of other text. The last w_last queries are kept: what remains of these counts, and what is read then."""
    chat.read(300, n_batch=100, end=False)
    assert chat.rewind(end)
    chat.read(n_more, end=end + n_more <= SINK + WINDOW)
    if chat.in_prompt:
        chat.read(1)
        n_kept = max(0, end - (300 - W_LAST))
        expect_choice(chat, min(W_LAST, n_kept + n_more + 1))
    else:
        assert chosen(chat.context) == () and chat.context.lazy_ratios() is None


def test_removed_answers_do_not_count(chat):
    chat.read(30)
    chat.decode(100)
    assert chosen(chat.context) == ()
    assert chat.rewind(90)
    chat.read(40, n_batch=13)
    expect_choice(chat)


@pytest.mark.parametrize("n_checks", [0, 200, 700])
def test_an_aborted_first_prompt(chat, n_checks):
    context = chat.context
    chat.read(100, end=False)
    batch = chat.copy(0).batch(300, [False] * 299 + [True])
    context.abort_after(n_checks)
    with pytest.raises(DecodeError):
        context.decode_batch(batch)
    context.abort_after(None)
    n_read = context.pos_max() + 1
    chat.tokens += [token.id for token in batch[: n_read - 100]]
    assert chosen(context) == () and context.in_prompt()
    chat.read(20)
    expect_choice(chat, 20)  # the queries before may have been overwritten when it was aborted


def test_a_first_prompt_for_which_there_is_no_room(chat):
    chat.read(500, end=False)
    with pytest.raises(DecodeError) as failure:
        chat.context.decode_batch(chat.copy(0).batch(600, [False] * 599 + [True]))
    assert failure.value.code == 1 and chat.context.in_prompt() and chosen(chat.context) == ()
    chat.read(20)
    expect_choice(chat)


def test_rewinds_after_the_choice(chat):
    chat.read(400)
    chat.spec = StreamingSpec(chosen(chat.context), 4, SINK, WINDOW, "full")
    chat.decode(30)
    held = chat.context.positions(STREAMING)
    assert not chat.rewind(300) and chat.context.positions(STREAMING) == held
    assert chat.rewind(400)
    chat.decode(30)
    layers = chosen(chat.context)
    assert chat.rewind(0) and chosen(chat.context) == () and layers
    again = Transcript(chat.subject, None, chat.context, seed=3)
    again.read(200)
    expect_choice(again)
    assert chat.difference() <= EXACT


@pytest.mark.parametrize("n_discard", [20, 250])
def test_a_context_shift_after_the_choice(subject, n_discard):
    model = subject("llama")
    text, answer = random_tokens(400), random_tokens(90, seed=1)
    with model.context(AUTO, n_ctx=512, n_ubatch=32) as context:
        context.read_prompt(text)
        spec = StreamingSpec(chosen(context), 4, SINK, WINDOW, "full")
        conversation = NumpyLlama(model.hf, spec).conversation()
        conversation.decode(text, range(400), first=0)
        assert context.seq_rm(0, SINK, SINK + n_discard)
        context.seq_add(0, SINK + n_discard, -1, -n_discard)
        kept = conversation.entries[SINK + n_discard :]
        conversation.entries = conversation.entries[:SINK] + [entry.at(entry.pos - n_discard) for entry in kept]
        start = 400 - n_discard
        assert context.positions(FULL) == list(range(start))
        computed = context.decode_one_by_one(answer, start)
        assert difference(computed, conversation.decode(answer, range(start, start + 90))) <= EXACT


def test_a_context_shift_before_the_choice(subject):
    """Ratios and choice are those of what is left, at its new positions."""
    model = subject("llama")
    with model.context(AUTO, n_ctx=512, n_ubatch=32) as context:
        text = random_tokens(100)
        context.decode(text)
        assert context.seq_rm(0, 10, 30)
        context.seq_add(0, 30, -1, -20)
        message = random_tokens(W_LAST + 8, seed=1)
        context.read_prompt(message, 80)
        assert context.lazy_ratios() is not None and len(chosen(context)) == 2
        spec = StreamingSpec(chosen(context), 4, SINK, WINDOW, "full")
        conversation = NumpyLlama(model.hf, spec).conversation()
        conversation.decode(text, range(100), first=0)
        conversation.entries = conversation.entries[:10] + [entry.at(entry.pos - 20) for entry in conversation.entries[30:]]
        conversation.decode(message, range(80, 120), first=0)
        answer = random_tokens(50, seed=2)
        computed = context.decode_one_by_one(answer, 120)
        assert difference(computed, conversation.decode(answer, range(120, 170))) <= EXACT


def test_an_open_prompt_is_still_open_where_nothing_is_chosen(chat):
    chat.read(30, end=False)
    assert chat.context.in_prompt() and chat.prompts == [(0, OPEN)]
    chat.decode(5, together=5)  # ends it
    assert not chat.context.in_prompt() and chosen(chat.context) == ()
    chat.read(200)
    expect_choice(chat)
