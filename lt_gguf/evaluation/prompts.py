"""Prompts of the evaluation's tasks, as long as asked for, in the tokens of any model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lt_gguf.evaluation.haystack import Haystack
from lt_gguf.evaluation.puzzle import Puzzle, hide
from lt_gguf.evaluation.tasks.base import Task
from lt_gguf.evaluation.words import WordSource

if TYPE_CHECKING:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter


class Tokenizer(Protocol):
    """What is needed of a model; `lt_gguf.evaluation.scorer.Scorer` has it."""

    @property
    def bos(self) -> list[int]:
        """The tokens that a text of this model begins with."""

    @property
    def chat_template(self) -> str | None:
        """Its Jinja template, `None` if it has none."""

    @property
    def eos_text(self) -> str:
        """How a template writes the end of an answer, empty if the model has no such token."""

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Without `bos`; `special`: names of special tokens in the text are these tokens."""


@dataclass(frozen=True)
class Prompt:
    """A puzzle in a haystack, ready for a model.

    Args:
        task: name of the task.
        tokens: what the model is given: the text, the question, and the beginning of the answer.
        n_given: how many of their last ones are that beginning. These are to be decoded: with `prefill = full` what follows
            from the end of a prompt is what the full model says, which would give the answer's first token away.
        answer: the tokens of the rest of the answer.
        spans: for each of `puzzle.expected`, where it is in `answer`: [begin, end).
        puzzle: what was asked.
        depth: where the first statement stands, from 0 to 1; `None`: anywhere.
    """

    task: str
    tokens: tuple[int, ...]
    n_given: int
    answer: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    puzzle: Puzzle
    depth: float | None

    @property
    def prompt(self) -> tuple[int, ...]:
        """What is to be read as a prompt."""
        return self.tokens[: -self.n_given]

    @property
    def given(self) -> tuple[int, ...]:
        """What is to be decoded before the answer."""
        return self.tokens[-self.n_given :]

    def score_tokens(self, predicted: Sequence[int]) -> float:
        """Share of what must be looked up whose every token is right, if `predicted` has the token that the model finds most
        likely at each place of `answer` when it is given those before it."""
        right = [tuple(predicted[begin:end]) == self.answer[begin:end] for begin, end in self.spans]
        return sum(right) / len(right)


def make_prompt(
    tokenizer: Tokenizer,
    task: Task,
    rng: np.random.Generator,
    length: int,
    depth: float | None,
    haystack: Haystack,
    held_out: bool = True,
) -> Prompt:
    """A new puzzle of `task` in as much of a haystack as fits.

    Args:
        tokenizer: of the model; with a chat template, the prompt is a chat, else plain text.
        rng: what is drawn depends on it, not on the model, but for how many sentences fit.
        length: most tokens of prompt and answer together; whole sentences come as near to it as they can.
        depth: where the puzzle's first statement stands: 0, before all else, to 1, after it; `None`: anywhere.
        haystack: where the sentences come from.
        held_out: whether keys and wordings are those that a model that is trained here has never seen.

    Raises:
        ValueError: the puzzle alone is longer than `length`, or the model's chat template refuses the prompt.
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth = {depth}: must be from 0, the beginning of the text, to 1, its end")
    puzzle = task.puzzle(WordSource(rng, held_out))
    answer, spans = answer_tokens(tokenizer, puzzle)
    placing = int(rng.integers(2**63))
    sentences = haystack.sentences(rng)
    filler: list[str] = []

    def asked_with(n: int) -> str:
        filler.extend(islice(sentences, max(0, n - len(filler))))
        parts = hide(np.random.default_rng(placing), filler[:n], [puzzle], depth)
        return ask(tokenizer, " ".join(part.text for part in parts), puzzle.question)

    @cache
    def tokens_with(n: int) -> tuple[int, ...]:
        return encode(tokenizer, asked_with(n) + space(tokenizer) + puzzle.prefix)

    def n_tokens(n: int) -> int:
        return len(tokens_with(n)) + len(answer)

    if (least := n_tokens(0)) > length:
        raise ValueError(f"a prompt of the task {task.name} takes {least} tokens, must be at most {length}: ask for longer ones")
    too_many = 1
    while n_tokens(too_many) <= length:
        too_many *= 2
    n = bisect_right(range(too_many), length, lo=too_many // 2, key=n_tokens) - 1
    tokens, asked = tokens_with(n), encode(tokenizer, asked_with(n))
    return Prompt(task.name, tokens, len(tokens) - n_common(tokens, asked), answer, spans, puzzle, depth)


def answer_tokens(tokenizer: Tokenizer, puzzle: Puzzle) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """The tokens after the answer's given beginning, and where in them each looked-up piece is."""
    # note: counted behind the prefix, since the first word of a text may have other tokens; pieces end where words end,
    # where no tokenizer has a token that goes on
    n_given = len(tokenizer.tokenize(puzzle.prefix))
    text, tokens, begin = puzzle.prefix, [], 0
    spans: list[tuple[int, int]] = []
    for piece in puzzle.answer[1:]:
        text += piece.text
        tokens = tokenizer.tokenize(text)[n_given:]
        if piece.looked_up:
            spans.append((begin, len(tokens)))
        begin = len(tokens)
    return tuple(tokens), tuple(spans)


def n_common(first: Sequence[int], second: Sequence[int]) -> int:
    """With how many of the same tokens both begin."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def ask(tokenizer: Tokenizer, text: str, question: str) -> str:
    """The prompt up to where the answer begins. `scripts/testbed/testbed_data.py` trains on the same two forms."""
    if tokenizer.chat_template is None:
        return f"{text}\nQuestion: {question}\nAnswer:"
    return _render(tokenizer.chat_template, tokenizer.eos_text, [f"{text}\n{question}"])


def go_on(tokenizer: Tokenizer, text: str, question: str, answer: str, later_question: str) -> str:
    """How a conversation that began with `ask` goes on after its answer: a later question, up to where its answer begins.

    Raises:
        ValueError: the model's chat template refuses it, or doesn't write the answer as it was given.
    """
    if tokenizer.chat_template is None:
        return f"\nQuestion: {later_question}\nAnswer:"
    rendered = _render(tokenizer.chat_template, tokenizer.eos_text, [f"{text}\n{question}", answer, later_question])
    # note: what a template writes before an answer may change once there is a later message, as with thoughts
    before, found, between = rendered.rpartition(answer)
    if not found or len(before) < len(text):
        raise ValueError("the model's chat template can't be used: it doesn't write answers as they were given")
    return between


def space(tokenizer: Tokenizer) -> str:
    """What is between the prompt and the answer."""
    return " " if tokenizer.chat_template is None else ""


def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    tokens = tokenizer.tokenize(text, special=tokenizer.chat_template is not None)
    bos = list(tokenizer.bos)
    has_bos = tokens[: len(bos)] == bos  # a template may spell it out
    return tuple(tokens if has_bos else bos + tokens)


def _render(template: str, eos_text: str, messages: Sequence[str]) -> str:
    """A user's messages and the answers between them in a chat template, up to where the model answers; without the token that begins
    a text."""
    import jinja2

    roles = ("user", "assistant")
    conversation: Any = [{"role": roles[i % 2], "content": message} for i, message in enumerate(messages)]
    try:
        return _formatter(template, eos_text)(messages=conversation).prompt
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the model's chat template can't be used: {' '.join(str(error).split())}") from None


@cache
def _formatter(template: str, eos_text: str) -> Jinja2ChatFormatter:
    from lt_gguf.runtime.library import load_llama_cpp

    return load_llama_cpp().llama_chat_format.Jinja2ChatFormatter(template, eos_token=eos_text, bos_token="")
