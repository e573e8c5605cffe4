"""Questions are put to a model as prompts, and its answers are scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture
from support.words_tokenizer import TEMPLATE, WordsTokenizer

from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.haystack import Haystack
from lt_gguf.evaluation.retrieval import ROOM_FOR_WORDS, Answer, Question, hash_of, prompt_of, questions, run
from lt_gguf.evaluation.scorer import Scorer
from lt_gguf.evaluation.tasks import TASKS

LENGTH = 400
ASKED = questions([*TASKS], [LENGTH], [0.5], 3)

both_ways = pytest.mark.parametrize("fast", [False, True], ids=["generated", "fast"])


class Knowing(WordsTokenizer):
    """Says what stands in `knows` after the prompts there; two at a time, as a scorer with two sequences."""

    eos = {0}

    def __init__(self) -> None:
        super().__init__(TEMPLATE)
        self.knows: dict[tuple[int, ...], list[int]] = {}
        self.asked: list[tuple] = []

    def learn(self, question: Question, n_right: int | None = None) -> None:
        """The answer, the first `n_right` tokens of it."""
        prompt = prompt_of(self, question, 0)
        self.knows[prompt.prompt] = [*prompt.given, *prompt.answer[:n_right]]

    def generate(self, requests: Iterable[tuple], stop) -> Iterator[list[int]]:
        assert stop == self.eos
        for group in pairs(requests):
            self.asked += group
            yield from (self.knows.get(prompt, [])[len(given) :][:n_max] for prompt, n_max, given in group)

    def logprobs(self, requests: Iterable[tuple], keep) -> Iterator[np.ndarray]:
        for group in pairs(requests):
            self.asked += group
            for prompt, continuation in group:
                rows = np.full((len(continuation), 5000), -9.0, np.float32)
                said = self.knows.get(prompt, [])
                rows[range(len(said)), said] = -0.1
                rows[range(len(said), len(continuation)), 0] = -0.1
                yield keep(rows, np.array(continuation))


def pairs(items: Iterable) -> Iterator[list]:
    group: list = []
    for item in items:
        group.append(item)
        if len(group) == 2:
            yield group
            group = []
    if group:
        yield group


def test_which_questions_there_are():
    asked = questions(["single", "votes"], [100, 300], [0, 0.5, 1], 2)
    single = [("single", length, depth, i) for length in (100, 300) for depth in (0, 0.5, 1) for i in (0, 1)]
    assert asked == single + [("votes", length, None, i) for length in (100, 300) for i in (0, 1)]
    with_depth = {question.task for question in questions([*TASKS], [100], [0.5], 1) if question.depth is not None}
    assert with_depth == {"single", "multi-key"}
    assert questions([], [100], [0.5], 1) == []


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((["single"], [100], [0.5], 0), "samples = 0: must be at least 1"),
        ((["single"], [0], [0.5], 1), "length = 0: must be at least 1 token"),
        ((["single"], [100], [1.5], 1), "depth = 1.5: must be from 0, the beginning of the text, to 1"),
        ((["double"], [100], [0.5], 1), 'task "double": must be one of single'),
    ],
)
def test_questions_that_cannot_be_asked(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        questions(*arguments)


def test_a_question_has_one_prompt():
    tokenizer = WordsTokenizer()
    question = Question("single", LENGTH, 0.5, 0)
    prompt = prompt_of(tokenizer, question, 0)
    assert prompt == prompt_of(tokenizer, question, 0) and len(prompt.tokens) > LENGTH - 60
    others = [("multi-key", LENGTH, 0.5, 0), ("single", LENGTH + 100, 0.5, 0)]
    others += [("single", LENGTH, 0.4, 0), ("single", LENGTH, 0.5, 1)]
    made = [prompt_of(tokenizer, Question(*other), 0) for other in others]
    made += [prompt_of(tokenizer, question, 1), prompt_of(tokenizer, Question("single", LENGTH, None, 0), 0)]
    puzzles = [prompt.puzzle, *(other.puzzle for other in made)]
    assert len({puzzle.statements for puzzle in puzzles}) == len(puzzles) == 7
    assert len({hash_of(other.tokens) for other in (prompt, *made)}) == 7


@both_ways
def test_a_model_that_knows_everything(fast):
    model = Knowing()
    for question in ASKED:
        model.learn(question)
    answers = list(run(model, ASKED, 0, fast=fast))
    assert [answer.question for answer in answers] == ASKED
    assert [answer.score for answer in answers] == [1] * len(ASKED)
    prompts = [prompt_of(model, question, 0) for question in ASKED]
    assert [answer.prompt for answer in answers] == [hash_of(prompt.tokens) for prompt in prompts]


@both_ways
def test_a_model_that_knows_something(fast):
    model = Knowing()
    model.learn(ASKED[1])
    several = next(question for question in ASKED if question.task == "multi-query")
    model.learn(several, prompt_of(model, several, 0).spans[0][1])
    scores = {answer.question: answer.score for answer in run(model, ASKED, 0, fast=fast)}
    assert scores == {question: {ASKED[1]: 1, several: 0.25}.get(question, 0) for question in ASKED}
    # other prompts than those that it has learned
    assert not any(answer.score for answer in run(model, ASKED, 1, fast=fast))


@both_ways
def test_the_beginning_of_the_answer_is_decoded(fast):
    """In the prompt it would be read with full attention, where `prefill = full`, and the answer's first token with it."""
    model = Knowing()
    list(run(model, ASKED, 0, fast=fast))
    for question, (prompt, *rest) in zip(ASKED, model.asked, strict=True):
        made = prompt_of(model, question, 0)
        assert model.detokenize(prompt).endswith("<|end|><|assistant|>")
        assert rest == ([(*made.given, *made.answer)] if fast else [len(made.answer) + ROOM_FOR_WORDS, made.given])


@both_ways
def test_questions_are_asked_when_they_are_needed(fast):
    made = []
    asked = (made.append(question) or question for question in ASKED)
    answers = run(Knowing(), asked, 0, fast=fast)
    next(answers)
    assert len(made) == 2  # as many as the model works on at a time
    assert isinstance(next(answers), Answer) and len(made) == 2


def test_needles_are_hidden_in_the_given_haystack():
    model = Knowing()
    haystack = Haystack(["the grass grows"], 1.0)
    (answer,) = run(model, ASKED[:1], 0, haystack)
    ((prompt, *_),) = model.asked
    assert model.detokenize(prompt).count("the grass grows") > 50
    assert answer.prompt == hash_of(prompt_of(model, ASKED[0], 0, haystack).tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    "streaming, n_parallel",
    [("off", 1), ("layers=all;sink=2;window=30;prefill=full", 3), ("layers=1,3;window=30;prefill=stream", 3)],
)
def test_a_real_model(hybrid_file, streaming, n_parallel):
    """A model with random weights, whose most likely tokens are taken for right: what it says by itself is what it is asked."""
    asked = questions(["single", "variable-tracking"], [450], [0.2], 2)
    options = ScorerOptions(n_parallel=n_parallel, n_threads=1, cache_type_k="f32", cache_type_v="f32", flash_attn=False)
    with Scorer(hybrid_file, streaming, options) as scorer:
        assert [answer.score for answer in run(scorer, asked, 0, fast=True)] == [0] * len(asked)  # it has learned nothing
        for answer in run(scorer, asked, 0):
            made = prompt_of(scorer, answer.question, 0)
            ((*said,),) = scorer.generate([(made.prompt, len(made.answer) + ROOM_FOR_WORDS, made.given)], scorer.eos)
            assert answer.score == made.puzzle.score(scorer.detokenize(said)) and said
            assert len(made.tokens) + len(made.answer) > 300
            # the first token of an answer comes from decoding what is given
            logprobs = next(scorer.logprobs([(made.prompt, (*made.given, *said))]))
            assert logprobs[made.n_given :].argmax(axis=1).tolist() == said
