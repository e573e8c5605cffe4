"""Asks a model the questions of the tasks, and scores its answers."""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lt_gguf.evaluation.haystack import Haystack
from lt_gguf.evaluation.prompts import Prompt, Tokenizer, make_prompt
from lt_gguf.evaluation.tasks import find_task
from lt_gguf.evaluation.tasks.needles import Needles

if TYPE_CHECKING:
    from lt_gguf.evaluation.scorer import Scorer

ROOM_FOR_WORDS = 16  # tokens that an answer may have besides the expected ones

_ANYWHERE = -1  # as a depth's millionths


class Question(NamedTuple):
    """Which prompt: the same one for every model with the same tokenizer and chat template, and the same seed.

    Args:
        task: its name.
        length: most tokens of prompt and answer.
        depth: where the needle stands, from 0 to 1; `None`: a task with statements all over the text.
        index: which of the prompts of this task, length and depth.
    """

    task: str
    length: int
    depth: float | None
    index: int  # type: ignore[assignment]  # in place of tuple.index, which nobody asks a question


@dataclass(frozen=True)
class Answer:
    """What became of a question.

    Args:
        score: from 0 to 1, the share of the expected that was found.
        prompt: a hash of the prompt's tokens: answers with the same one can be compared one by one.
    """

    question: Question
    score: float
    prompt: str


def questions(tasks: Sequence[str], lengths: Sequence[int], depths: Sequence[float], samples: int) -> list[Question]:
    """`samples` questions for each task and length; where one needle is looked for, for each depth too.

    Raises:
        ValueError: there is no such task, or a number is out of range.
    """
    if samples < 1:
        raise ValueError(f"samples = {samples}: must be at least 1")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth = {depth:g}: must be from 0, the beginning of the text, to 1, its end")
    for length in lengths:
        if length < 1:
            raise ValueError(f"length = {length}: must be at least 1 token")
    return [
        Question(name, length, depth, index)
        for name in tasks
        for length in lengths
        for depth in (depths if _has_one_place(name) else (None,))
        for index in range(samples)
    ]


def prompt_of(tokenizer: Tokenizer, question: Question, seed: int, haystack: Haystack = Haystack()) -> Prompt:
    """The prompt of a question, by default hidden in stories. Raises ValueError as `make_prompt` does."""
    task, length, depth, index = question
    millionths = _ANYWHERE if depth is None else round(depth * 1e6)
    rng = np.random.default_rng([seed, zlib.crc32(task.encode()), length, millionths + 1, index])
    return make_prompt(tokenizer, find_task(task), rng, length, depth, haystack)


def run(
    scorer: Scorer, asked: Iterable[Question], seed: int, haystack: Haystack = Haystack(), fast: bool = False
) -> Iterator[Answer]:
    """Asks questions one after the other, as many at a time as `scorer` has sequences.

    The given beginning of an answer is decoded, not read as a part of the prompt: see `Prompt`.

    Args:
        seed: of the prompts, at least 0.
        haystack: what needles are hidden in; stories by default.
        fast: one look at each prompt instead of generating an answer: the model is given the right answer, and what must be
            looked up is right if each of its tokens is the most likely one where it stands. It differs from generating where
            a model answers in other words, or goes wrong and comes back.

    Yields:
        The answers in the order of the questions.

    Raises:
        ValueError: a length is too small for its task, or a prompt doesn't fit the context.
    """
    waiting: deque[tuple[Question, Prompt]] = deque()

    def prompts() -> Iterator[Prompt]:
        for question in asked:
            waiting.append((question, prompt_of(scorer, question, seed, haystack)))
            yield waiting[-1][1]

    outputs: Iterator[list[int]]
    if fast:
        answered = ((prompt.prompt, (*prompt.given, *prompt.answer)) for prompt in prompts())
        likeliest = scorer.logprobs(answered, keep=lambda logprobs, _: logprobs.argmax(axis=1))
        outputs = (tokens.tolist() for tokens in likeliest)
    else:
        requests = ((prompt.prompt, len(prompt.answer) + ROOM_FOR_WORDS, prompt.given) for prompt in prompts())
        outputs = scorer.generate(requests, scorer.eos)
    for output in outputs:
        question, prompt = waiting.popleft()
        if fast:
            score = prompt.score_tokens(output[prompt.n_given :])
        else:
            score = prompt.puzzle.score(scorer.detokenize(output))
        yield Answer(question, score, hash_of(prompt.tokens))


def hash_of(tokens: Collection[int]) -> str:
    """64 bits that tell prompts apart."""
    return hashlib.sha256(np.fromiter(tokens, dtype="<i4").tobytes()).hexdigest()[:16]


def _has_one_place(name: str) -> bool:
    task = find_task(name)
    return isinstance(task, Needles) and task.n_queries == 1
