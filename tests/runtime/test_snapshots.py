"""Going back: little is read again, and all is as in a fresh context that was fed the same prompts and decoded tokens."""

from __future__ import annotations

import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from support.llama import all_modes, answer, assert_like, fed, load, logits, n_read, text
from support.tiny_checkpoint import N_VOCAB, SINK, WINDOW, hybrid_file  # noqa: F401 - a fixture

import lt_gguf  # noqa: F401 - before llama_cpp, to which it shows the libraries
from lt_gguf.runtime.prompts import Piece, Prompts
from lt_gguf.runtime.snapshots import Snapshots

# ------------------------------------------------------------------------------- conversations


@all_modes
def test_editing_the_last_message_reads_only_what_follows_the_answer_before_it(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    first, second, edited = text(600), text(500, 1), text(150, 2)
    said = answer(llm, first)
    answer(llm, first + said + second)
    common = second[:30]  # what a chat template writes before each message
    prompt = first + said + common + edited
    assert n_read(llm, lambda: answer(llm, prompt, 1)) == len(common + edited) + 1  # and the answer's last token
    assert_like(llm, hybrid_file, mode, [("prompt", first), ("decode", said[:-1]), ("prompt", said[-1:] + common + edited)])
    assert answer(llm, prompt) == answer(fed(hybrid_file, mode, [("prompt", first), ("decode", said[:-1])]), prompt)


@pytest.mark.slow
@all_modes
@pytest.mark.parametrize("n_answer", [2, 150, 400])
def test_regenerating_an_answer_reads_nothing(hybrid_file, mode, n_answer):
    llm = load(hybrid_file, mode)
    document, question = text(900), text(300, 1)
    for prompt in (document, document + question):
        said = answer(llm, prompt, n_answer)
        assert n_read(llm, lambda: next(llm.generate(prompt, temp=0))) == 0
        np.testing.assert_allclose(logits(llm), logits(fed(hybrid_file, mode, split(prompt, document))), atol=2e-4)
        assert n_read(llm, lambda: answer(llm, prompt, n_answer)) == n_answer - 1
        assert answer(llm, prompt, n_answer) == said


def split(prompt: list[int], document: list[int]) -> list[tuple[str, list[int]]]:
    rest = prompt[len(document) :]
    return [("prompt", document)] + ([("prompt", rest)] if rest else [])


@all_modes
def test_going_back_several_messages(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    history, prompt = [], []
    for turn in range(5):
        message = text(200, turn)
        history.append(("prompt", prompt[len(prompt) - 1 :] + message if prompt else message))
        prompt = prompt + message
        said = answer(llm, prompt, 9)
        history.append(("decode", said[:-1]))
        prompt = prompt + said
    second = [token for _, tokens in history[:4] for token in tokens]
    edited = second + text(100, 9)
    assert n_read(llm, lambda: answer(llm, edited, 1)) == 100
    assert_like(llm, hybrid_file, mode, [*history[:4], ("prompt", text(100, 9))])
    assert llm._snapshots.positions[-1] == len(edited)  # what was replaced is gone


@all_modes
def test_without_room_for_snapshots_all_is_read_again_and_right(hybrid_file, mode):
    llm = load(hybrid_file, mode, snapshot_limit=0)
    first, second = text(600), text(500, 1)
    said = answer(llm, first)
    answer(llm, first + said + second)
    prompt = first + said + second[:10] + text(50, 2)
    assert n_read(llm, lambda: answer(llm, prompt, 1)) == len(prompt)
    rest = prompt[len(first) + len(said) - 1 :]
    assert_like(llm, hybrid_file, mode, [("prompt", first), ("decode", said[:-1]), ("prompt", rest)])


def test_what_needs_no_snapshot_takes_none(hybrid_file):
    llm = load(hybrid_file, streaming="off")
    answer(llm, text(600), 30)
    answer(llm, text(600), 30)
    assert len(llm._snapshots) == 0
    llm = load(hybrid_file)
    answer(llm, text(600), 30)
    llm._snapshots.clear()
    llm.n_tokens -= 10  # within what the window still holds
    assert n_read(llm, lambda: llm.eval([5])) == 1


@all_modes
def test_the_limit_drops_the_oldest_first(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    prompt: list[int] = []
    for turn in range(4):
        prompt = prompt + text(300, turn)
        prompt += answer(llm, prompt)
    all_positions, limit = llm._snapshots.positions, llm._snapshots.n_bytes // 2
    assert len(all_positions) == 7  # four prompts' ends, three beginnings
    llm = load(hybrid_file, mode, snapshot_limit=limit)
    prompt = []
    for turn in range(4):
        prompt = prompt + text(300, turn)
        prompt += answer(llm, prompt)
        assert llm._snapshots.n_bytes <= limit
    kept = llm._snapshots.positions
    assert 2 <= len(kept) < 7 and kept == all_positions[-len(kept) :]


# ------------------------------------------------------------------------- eval and generate directly


@pytest.mark.slow
@all_modes
@pytest.mark.parametrize("n_kept", [0, 1, 30, 200, 599, 600, 601, 750, 799, 800])
def test_eval_after_setting_n_tokens_back(hybrid_file, mode, n_kept):
    """600 tokens of a prompt, 200 decoded ones: what is kept stays what it was."""
    llm = load(hybrid_file, mode)
    prompt, decoded, more = text(600), text(200, 1), text(80, 2)
    llm.eval(prompt)
    for token in decoded:
        llm.eval([token])
    llm.n_tokens = n_kept
    llm.eval(more)
    history = [("prompt", prompt), ("decode", decoded[: n_kept - 600]), ("prompt", more)]
    assert_like(llm, hybrid_file, mode, [("prompt", prompt[:n_kept] + more)] if n_kept < 600 else history)


@pytest.mark.slow
@all_modes
def test_wrong_drafts_are_taken_back(hybrid_file, mode):
    class WrongDraft:
        def __call__(self, input_ids, /, **_):
            return np.full(300, 5, dtype=np.intc)

    settings = {"n_batch": 512}
    expected = answer(load(hybrid_file, mode, **settings), text(600))
    for draft_model in (WrongDraft(), LlamaPromptLookupDecoding(num_pred_tokens=4)):
        llm = load(hybrid_file, mode, draft_model=draft_model, **settings)
        assert answer(llm, text(600)) == expected
        assert answer(llm, text(600)) == expected


@all_modes
def test_logits_of_all_tokens_change_nothing(hybrid_file, mode):
    llm = load(hybrid_file, mode, logits_all=True)
    llm.eval(text(600))
    plain = load(hybrid_file, mode)
    for n in (599, 600):
        plain.reset()
        plain.eval(text(600)[:n])
        np.testing.assert_allclose(llm.scores[n - 1], logits(plain), atol=2e-4)


@all_modes
def test_logits_are_asked_for_at_the_prompts_end_only(hybrid_file, mode, monkeypatch):
    llm = load(hybrid_file, mode)
    asked = []

    def decode(batch):
        asked.extend(batch.batch.logits[: batch.batch.n_tokens])
        return type(llm._ctx).decode(llm._ctx, batch)

    monkeypatch.setattr(llm._ctx, "decode", decode)
    llm.eval(text(300))
    assert asked == [0] * 299 + [1]


# ------------------------------------------------------------------------------------------ the parts


def test_prompts():
    prompts = Prompts()
    prompts.open(0)
    prompts.close(100)
    prompts.open(150)
    assert prompts.is_open and prompts.first_end() == 100
    prompts.close(200)
    assert (prompts.first_end(99), prompts.first_end(100), prompts.first_end(200)) == (100, 200, 0)
    assert list(prompts.pieces(100, 220)) == [Piece(100, 150, False), Piece(150, 200, True), Piece(200, 220, False)]
    assert list(prompts.pieces(50, 160)) == [Piece(50, 100, True, True), Piece(100, 150, False), Piece(150, 160, True)]
    prompts.truncate(160)
    assert prompts.is_open
    assert list(prompts.pieces(155, 160)) == [Piece(155, 160, True, True)]
    prompts.truncate(150)
    assert not prompts.is_open and prompts.spans == [(0, 100)]
    prompts.truncate(100)
    assert prompts.spans == [(0, 100)]
    prompts.truncate(0)
    assert prompts == Prompts() and prompts.first_end() == 0


def test_snapshots_hold_no_more_than_sinks_window_and_spare_cells(hybrid_file):
    llm = load(hybrid_file)
    llm.eval(text(1500))
    (position,) = llm._snapshots.positions
    assert position == 1500
    n_cells = 256  # SINK + WINDOW + a micro-batch, rounded up
    assert n_cells > SINK + WINDOW
    assert llm._snapshots.n_bytes < 2 * n_cells * 2 * 2 * 16 * 4 + 4 * N_VOCAB + 8192


def test_a_snapshot_that_is_larger_than_the_limit_is_not_kept(hybrid_file):
    llm = load(hybrid_file)
    llm.eval(text(600))
    snapshots = Snapshots(llm._snapshots.n_bytes - 1)
    snapshots.take(llm.ctx, 600, logits(llm))
    assert len(snapshots) == 0
    snapshots.take(llm.ctx, 600)
    snapshots.take(llm.ctx, 600)
    assert snapshots.positions == [600]
