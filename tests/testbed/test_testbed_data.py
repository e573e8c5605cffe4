"""What the testbed model is trained on: nothing that is held out, nothing that has two answers, and the right loss weights."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import experiments_training
import testbed_data as data
import train_testbed
from testbed_model import RowMaker

from lt_gguf.evaluation.tasks.needles import wordings
from lt_gguf.evaluation.words import ADJECTIVES, NOUNS, keys

TEXTS = ["A line of prose.\nAnother line of prose, which is longer."]


@pytest.fixture(scope="module")
def rows() -> RowMaker:
    return RowMaker(ROOT / "models" / "demo" / "tokenizer.model", TEXTS)


def documents(kind: str, n: int = 60, n_chars: int = 1500) -> list[data.Segments]:
    return [data.document(np.random.default_rng(seed), n_chars, TEXTS, {kind: 1}) for seed in range(n)]


def text_of(segments: data.Segments) -> str:
    return "".join(text for text, _ in segments)


@pytest.mark.parametrize("kind", ["puzzles", "alike"])
def test_held_out_keys_and_wordings_are_never_asked_for(kind):
    things = re.compile(rf"the ((?:{'|'.join(ADJECTIVES)}) (?:{'|'.join(NOUNS)}))\b")
    verbs = {wording.statement.split("{k}")[0].removesuffix("the ") for wording in wordings(held_out=True)}
    for segments in documents(kind):
        hidden = [text for text, weight in segments if weight == data.CONTEXT_WEIGHT]
        assert not set(things.findall(" ".join(hidden))) & set(keys(held_out=True))
        assert not any(verb in text for verb in verbs for text in hidden)


@pytest.mark.parametrize("kind", ["puzzles", "alike"])
def test_looked_up_pieces_stand_in_the_text_before_them(kind):
    found = 0
    for segments in documents(kind):
        before = ""
        for text, weight in segments:
            if weight == data.ANSWER_WEIGHT:
                found += 1
                assert re.search(rf"\b{re.escape(text.strip())}\b", before), (text, before)
            before += text
    assert found > 150


def test_a_text_has_one_vote_at_most():
    for segments in documents("puzzles", n=200, n_chars=4000):
        assert text_of(segments).count("Which animal got the most votes?") <= 1


def test_half_of_the_keys_are_alike():
    def share(source) -> float:
        drawn = [source.key() for _ in range(8)]
        assert len(set(drawn)) == 8 and not set(drawn) & set(keys(held_out=True))
        pairs = [(a, b) for a in drawn for b in drawn if a != b]
        return sum(bool(set(a.split()) & set(b.split())) for a, b in pairs) / len(pairs)

    alike, others = (
        np.mean([share(kind(np.random.default_rng(seed), held_out=False)) for seed in range(40)])
        for kind in (data.ConfusableWords, data.WordSource)
    )
    assert alike > 2 * others


@pytest.mark.parametrize("kind", ["map", "repeat", "puzzles", "alike", "chat", "python", "story"])
def test_segments_are_encoded_as_the_whole_text_is(rows, kind):
    for segments in documents(kind, n=10):
        ids, weights = rows.encode(segments)
        assert len(ids) == len(weights)
        assert ids == rows.encode([(text_of(segments), 1.0)])[0]


def test_a_number_and_the_space_before_it_have_no_lone_space_between_them(rows):
    """Else a space would stand between a value and the words that say whose it is."""
    pieces = [rows.sp.id_to_piece(token) for token in rows.encode([("The code of the red box is 48213.", 1.0)])[0]]
    assert pieces[-7:] == ["▁is", "▁4", "8", "2", "1", "3", "."]
    for digit in range(10):
        assert len(rows.sp.encode(f" {digit}")) == 1 == len(rows.sp.encode(str(digit)))


def test_rows_are_full_and_depend_on_the_seed_alone(rows):
    shares = train_testbed.PHASES[1].shares
    ids, weights = rows.batch(np.random.default_rng(3), 4, 300, shares)
    again, _ = rows.batch(np.random.default_rng(3), 4, 300, shares)
    assert ids.shape == weights.shape == (4, 300) and (ids == again).all()
    assert (ids[:, 0] == rows.bos).all() and (weights[:, 0] == 0).all() and (weights == data.ANSWER_WEIGHT).any()


def test_the_plan_of_a_training():
    """The learning rate rises, is flat and falls; rows get longer."""
    phases, rates = zip(*(train_testbed.plan(step) for step in range(train_testbed.STEPS)))
    flat = [step for step, rate in enumerate(rates) if rate == 1]
    assert rates[0] == 0.05 and rates[-1] == 0.02 and flat == list(range(flat[0], flat[-1] + 1)) and len(flat) > 0.3 * len(rates)
    assert list(rates) == sorted(rates[: flat[0]]) + [1.0] * len(flat) + sorted(rates[flat[-1] + 1 :], reverse=True)
    assert [phase.length for phase in phases] == sorted(phase.length for phase in phases)
    assert [phases.count(phase) for phase in train_testbed.PHASES] == [phase.steps for phase in train_testbed.PHASES]
    for step in (-1, train_testbed.STEPS):
        with pytest.raises(ValueError, match=f"step {step}: must be from 0 to"):
            train_testbed.plan(step)


def test_conversations_for_fine_tuning():
    for messages in experiments_training.conversations(5, 600):
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) and len(messages) >= 2
        assert all(m["content"].strip() and "<|" not in m["content"] for m in messages)
        assert messages[0]["content"].count("\n") >= 1  # the text, and the first question below it
