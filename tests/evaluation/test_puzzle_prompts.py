"""Prompts are as long as asked for, have the needle where asked for, and look as a model was trained to read them."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from support.words_tokenizer import BOS, TEMPLATE, WordsTokenizer

from lt_gguf.evaluation.haystack import Haystack
from lt_gguf.evaluation.prompts import Prompt, make_prompt
from lt_gguf.evaluation.tasks import TASKS

ROOT = Path(__file__).parents[2]

all_tasks = pytest.mark.parametrize("name", TASKS)
both_forms = pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])


def make(tokenizer, name: str = "single", length: int = 400, depth: float | None = None, seed: int = 0, **settings) -> Prompt:
    return make_prompt(tokenizer, TASKS[name], np.random.default_rng(seed), length, depth, Haystack(), **settings)


def used(prompt: Prompt) -> int:
    return len(prompt.tokens) + len(prompt.answer)


def sentences_before_and_after(text: str, needle: str) -> tuple[int, int]:
    before, after = text.split(needle)
    return before.count("."), after.count(".")


@pytest.mark.slow
@all_tasks
@both_forms
def test_a_prompt_is_as_long_as_whole_sentences_allow(name, template):
    tokenizer = WordsTokenizer(template)
    lengths = range(330, 420)
    by_length = {length: used(make(tokenizer, name, length)) for length in lengths}
    assert all(by_length[length] <= length for length in lengths)
    # what fits a longer prompt would fit this one, too, if it is short enough
    possible = set(by_length.values())
    assert len(possible) > 4
    for length in range(max(min(possible), 370), 420):
        assert by_length[length] == max(n for n in possible if n <= length)


def test_a_long_prompt_is_full():
    prompt = make(WordsTokenizer(TEMPLATE), length=20_000)
    assert 20_000 - 40 < used(prompt) <= 20_000


def test_the_plain_form():
    tokenizer = WordsTokenizer()
    prompt = make(tokenizer)
    puzzle = prompt.puzzle
    text = tokenizer.detokenize(prompt.tokens)
    assert text.startswith("<s>") and text.count("<s>") == 1
    haystack, rest = text.removeprefix("<s>").split("\n", 1)
    assert rest == f"Question: {puzzle.question}\nAnswer: {puzzle.prefix}"
    assert f" {puzzle.statements[0]} " in f" {haystack} " and re.fullmatch('["A-Z].*[.!?]"?', haystack)
    assert tokenizer.detokenize(prompt.answer) == puzzle.rest


def test_the_form_of_a_chat():
    tokenizer = WordsTokenizer(TEMPLATE)
    prompt = make(tokenizer)
    text = tokenizer.detokenize(prompt.tokens)
    ends = f"\n{prompt.puzzle.question}<|end|><|assistant|>{prompt.puzzle.prefix}"
    assert text.startswith("<s><|user|>") and text.endswith(ends)
    # names of special tokens are one token each
    assert prompt.tokens[:2] == (BOS, *tokenizer.tokenize("<|user|>", special=True))
    assert len(tokenizer.tokenize("<|assistant|>", special=True)) == 1 < len(tokenizer.tokenize("<|assistant|>"))


@pytest.mark.parametrize(
    "template, bos, n",
    [
        (None, (), 0),
        (TEMPLATE, (), 0),
        (None, (BOS,), 1),
        (TEMPLATE, (BOS,), 1),
        (TEMPLATE.replace("{{ bos_token }}", "<s>"), (BOS,), 1),
    ],
)
def test_what_begins_a_text_comes_once_if_the_model_wants_it(template, bos, n):
    prompt = make(WordsTokenizer(template, bos))
    assert prompt.tokens.count(BOS) == n == prompt.tokens[: max(n, 1)].count(BOS)


@both_forms
@all_tasks
def test_the_answer_goes_on_where_the_prompt_ends(name, template):
    tokenizer = WordsTokenizer(template)
    prompt = make(tokenizer, name)
    text = tokenizer.detokenize(prompt.tokens) + prompt.puzzle.rest
    assert tokenizer.tokenize(text, special=True) == [*prompt.tokens, *prompt.answer]
    pieces = [tokenizer.detokenize(prompt.answer[begin:end]) for begin, end in prompt.spans]
    assert pieces == [f" {expected}" for expected in prompt.puzzle.expected]
    assert prompt.task == name


@both_forms
@all_tasks
def test_the_beginning_of_the_answer_is_known(name, template):
    tokenizer = WordsTokenizer(template)
    prompt = make(tokenizer, name)
    assert tokenizer.detokenize(prompt.given) == ("" if template else " ") + prompt.puzzle.prefix
    assert tokenizer.detokenize(prompt.prompt).endswith("<|assistant|>" if template else "\nAnswer:")
    assert prompt.prompt + prompt.given == prompt.tokens


@pytest.mark.parametrize("depth", [0, 0.2, 0.5, 0.8, 1])
@pytest.mark.parametrize("name", ["single", "multi-key"])
def test_the_needle_stands_at_its_depth(name, depth):
    tokenizer = WordsTokenizer(TEMPLATE)
    for seed in range(5):
        prompt = make(tokenizer, name, 2000, depth, seed)
        text = tokenizer.detokenize(prompt.tokens).split("\n")[0]
        before, after = sentences_before_and_after(text, prompt.puzzle.statements[0])
        n_others = len(prompt.puzzle.statements) - 1  # these may stand anywhere
        assert abs(before - depth * (before + after)) <= 1 + n_others
        assert prompt.depth == depth


def test_everything_follows_from_the_random_numbers():
    one, same, other = (make(WordsTokenizer(TEMPLATE), seed=seed) for seed in (1, 1, 2))
    assert one == same and one.tokens != other.tokens and one.puzzle != other.puzzle


def test_another_tokenizer_gets_the_same_text():
    words, chat = WordsTokenizer(), WordsTokenizer(TEMPLATE)
    plain, in_chat = make(words, length=500), make(chat, length=520)
    first = words.detokenize(plain.tokens).removeprefix("<s>").split(". ")[0]
    assert plain.puzzle == in_chat.puzzle
    assert first in chat.detokenize(in_chat.tokens)


def test_keys_are_held_out_unless_told_otherwise():
    from lt_gguf.evaluation.words import keys

    tokenizer = WordsTokenizer()
    for held_out in (True, False):
        question = make(tokenizer, held_out=held_out).puzzle.question
        assert any(key in question for key in keys(held_out)) and not any(key in question for key in keys(not held_out))
    assert make(tokenizer) == make(tokenizer, held_out=True)


def test_scores_of_likely_tokens():
    prompt = make(WordsTokenizer(), "multi-query")
    answer = list(prompt.answer)
    assert len(prompt.spans) == 4 and prompt.score_tokens(answer) == 1
    for begin, end in prompt.spans:
        for i in range(begin, end):  # a wrong token spoils its piece
            assert prompt.score_tokens([*answer[:i], -1, *answer[i + 1 :]]) == 0.75
    looked_up = {i for begin, end in prompt.spans for i in range(begin, end)}
    assert prompt.score_tokens([token if i in looked_up else -1 for i, token in enumerate(answer)]) == 1
    assert prompt.score_tokens([-1] * len(answer)) == 0
    one = dataclasses.replace(prompt, spans=prompt.spans[:1])
    assert one.score_tokens(answer[: prompt.spans[0][1]]) == 1


def test_a_puzzle_that_does_not_fit():
    tokenizer = WordsTokenizer()
    least = next(length for length in range(1, 400) if _fits(tokenizer, "single", length))
    prompt = make(tokenizer, length=least)
    assert used(prompt) == least  # the puzzle alone
    assert tokenizer.detokenize(prompt.tokens).startswith(f"<s>{prompt.puzzle.statements[0]}\n")
    with pytest.raises(ValueError, match=f"a prompt of the task single takes {least} tokens, must be at most {least - 1}"):
        make(tokenizer, length=least - 1)


def _fits(tokenizer, name: str, length: int) -> bool:
    try:
        make(tokenizer, name, length)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("depth", [-0.1, 1.1, float("nan")])
def test_a_depth_out_of_range(depth):
    with pytest.raises(ValueError, match=f"depth = {depth}: must be from 0, the beginning of the text, to 1, its end"):
        make(WordsTokenizer(), depth=depth)


@pytest.mark.parametrize(
    "template, complaint",
    [
        ("{{ raise_exception('no\nusers') }}", "no users"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].nothing.at_all }}", "has no attribute"),
    ],
)
def test_a_template_that_cannot_be_used(template, complaint):
    with pytest.raises(ValueError, match=f"the model's chat template can't be used: .*{complaint}") as error:
        make(WordsTokenizer(template))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@all_tasks
def test_the_testbed_is_trained_on_the_same_tokens(name, chat):
    """Text, question and answer as `scripts/testbed/testbed_data.py` makes them, segment by segment, in the demo's tokenizer."""
    sys.path.insert(0, str(ROOT / "scripts" / "testbed"))
    import sentencepiece
    import testbed_data as data

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "models" / "demo" / "tokenizer.model"))

    class Tokenizer:
        bos = [pieces.bos_id()]
        eos_text = ""
        chat_template = (ROOT / "models" / "demo" / "chat_template.jinja").read_text() if chat else None

        def tokenize(self, text: str, special: bool = False) -> list[int]:
            parts = re.split(f"({'|'.join(map(re.escape, (data.USER, data.ASSISTANT, data.END)))})", text) if special else [text]
            return [token for part in parts if part for token in encode(part)]

    def encode(part: str) -> list[int]:
        names = (data.USER, data.ASSISTANT, data.END)
        return [pieces.piece_to_id(part)] if part in names else pieces.encode(part)

    tokenizer = Tokenizer()
    prompt = make(tokenizer, name, 700)
    text = pieces.decode([token for token in prompt.tokens if not pieces.is_control(token)])
    haystack = text.split("\nQuestion: " if not chat else f"\n{prompt.puzzle.question}")[0]
    asked = data._asked(prompt.puzzle, chat)
    segments = [(data.USER, 1.0), (haystack, 1.0), ("\n", 1.0), *asked[1:]] if chat else [(haystack, 1.0), *asked]
    segments = [part for segment, _ in segments for part in re.split(r"(<\|\w+\|>)", segment) if part]
    expected = [token for part in segments for token in encode(part)]
    ends = encode(data.END) if chat else []
    assert [*prompt.tokens, *prompt.answer, *ends] == [pieces.bos_id(), *expected]
