"""What the testbed model is trained on: nothing that is held out, nothing that has two answers, and the right loss weights."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "testbed"))

import experiments_training
import testbed_data as data
import testbed_model
import train_testbed
from testbed_model import RowMaker

from lt_gguf.evaluation.tasks.needles import wordings
from lt_gguf.evaluation.words import ADJECTIVES, NOUNS, VALUES, keys

TEXTS = ["A line of prose.\nAnother line of prose, which is longer."]


@pytest.fixture(scope="module")
def rows() -> RowMaker:
    return RowMaker(ROOT / "models" / "demo" / "tokenizer.model", TEXTS)


def documents(kind: str, n: int = 60, n_chars: int = 1500) -> list[data.Segments]:
    return [data.document(np.random.default_rng(seed), n_chars, TEXTS, {kind: 1}) for seed in range(n)]


def text_of(segments: data.Segments) -> str:
    return "".join(text for text, _ in segments)


@pytest.mark.parametrize("kind", list(data.PUZZLES))
def test_held_out_keys_and_wordings_are_never_asked_for(kind):
    things = re.compile(rf"the ((?:{'|'.join(ADJECTIVES)}) (?:{'|'.join(NOUNS)}))\b")
    verbs = {wording.statement.split("{k}")[0].removesuffix("the ") for wording in wordings(held_out=True)}
    for segments in documents(kind):
        hidden = [text for text, weight in segments if weight == data.CONTEXT_WEIGHT]
        assert not set(things.findall(" ".join(hidden))) & set(keys(held_out=True))
        assert not any(verb in text for verb in verbs for text in hidden)


@pytest.mark.parametrize("kind", list(data.PUZZLES))
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


def test_numbers_begin_alike():
    def begin_alike(source) -> np.ndarray:
        drawn = [source.number() for _ in range(8)]
        assert len(set(drawn)) == 8 and all(len(number) == 5 and number[0] != "0" for number in drawn)
        shared = [drawn[-1][:n] in {number[:n] for number in drawn[:-1]} for n in (1, 2, 3)]
        return np.array([*shared, drawn[-1][:2] in {number[:2] for number in drawn[:-2]}])

    alike, others = (
        np.mean([begin_alike(kind(np.random.default_rng(seed), held_out=False)) for seed in range(200)], axis=0)
        for kind in (data.PUZZLES["closely alike"], data.PUZZLES["alike"])
    )
    assert alike[0] > others[0] and 0.2 < alike[1] < 0.5 and alike[2] < 0.1 and others[1] < 0.15
    assert alike[3] > 0.2, "like any number before, not like the latest only"
    source = data.ConfusableNumbers(np.random.default_rng(0), held_out=False)
    assert len({source.number() for _ in range(2000)}) == 2000


@pytest.mark.parametrize("kind", ["map", "repeat", *data.PUZZLES, "chat", "python", "story"])
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


def test_first_digits_take_the_place_of_the_latest_merges():
    made = io.BytesIO()
    lines = [f"The {word} of the box is {i * 7919}." for i, word in enumerate(VALUES * 3)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=made,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    before = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    after = sentencepiece.SentencePieceProcessor(model_proto=testbed_model.with_first_digits(made.getvalue()))
    assert before.encode("box is 48213", out_type=str)[-6:] == ["▁", "4", "8", "2", "1", "3"]
    assert after.encode("box is 48213", out_type=str)[-5:] == ["▁4", "8", "2", "1", "3"]
    assert len(after) == len(before) and after.decode(after.encode(lines[5])) == lines[5]
    changed = [i for i in range(len(before)) if before.id_to_piece(i) != after.id_to_piece(i)]
    merges = [i for i in range(len(before)) if before.get_score(i) < 0 and len(before.id_to_piece(i)) > 1 and not before.is_byte(i)]
    assert changed == sorted(merges, key=before.get_score)[:10][::-1]


def test_rows_are_full_and_depend_on_the_seed_alone(rows):
    shares = train_testbed.PHASES[1].shares
    ids, weights = rows.batch(np.random.default_rng(3), 4, 300, shares)
    again, _ = rows.batch(np.random.default_rng(3), 4, 300, shares)
    assert ids.shape == weights.shape == (4, 300) and (ids == again).all()
    assert (ids[:, 0] == rows.bos).all() and (weights[:, 0] == 0).all() and (weights == data.ANSWER_WEIGHT).any()


def test_the_plan_of_a_training():
    """The learning rate rises, is flat and falls, and falls once more from below; rows get longer, twice."""
    phases, rates = zip(*(train_testbed.plan(step) for step in range(train_testbed.STEPS)))
    flat, first = rates.count(1.0), sum(phase.steps for phase in train_testbed.LONGER_AND_LONGER)
    assert rates[0] == 0.05 and rates[first - 1] == rates[-1] == 0.02 and flat > 0.3 * first
    assert list(rates[:first]) == sorted(rates[:19]) + [1.0] * flat + sorted(rates[19 + flat : first], reverse=True)
    assert rates[first] == 0.4 and list(rates[first:]) == sorted(rates[first:], reverse=True)
    for part in (phases[:first], phases[first:]):
        assert [phase.length for phase in part] == sorted(phase.length for phase in part)
    assert [phases.count(phase) for phase in train_testbed.PHASES] == [phase.steps for phase in train_testbed.PHASES]
    for step in (-1, train_testbed.STEPS):
        with pytest.raises(ValueError, match=f"step {step}: must be from 0 to"):
            train_testbed.plan(step)


@pytest.mark.slow
def test_conversations_for_fine_tuning():
    for messages in experiments_training.conversations(5, 600):
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) and len(messages) >= 2
        assert all(m["content"].strip() and "<|" not in m["content"] for m in messages)
        assert messages[0]["content"].count("\n") >= 1  # the text, and the first question below it
