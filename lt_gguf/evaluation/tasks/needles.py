"""Needles in a haystack (RULER's NIAH tasks, arXiv 2404.06654, section 3.1): one, one among others like it, several at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from lt_gguf.evaluation.puzzle import Piece, Puzzle
from lt_gguf.evaluation.tasks.base import Task
from lt_gguf.evaluation.words import WordSource, pick

N_KEYS = 8  # of a multi-key puzzle, the one that is asked for included
N_QUERIES = 4


@dataclass(frozen=True)
class Wording:
    """How a needle is said and asked for: `statement + " " + value + "."`, with {k} where the key stands.

    Args:
        several: the question for several keys, with {k} where their list stands.
        number: whether the value is a number, else a word.
        held_out: never in the training data of a model that is trained here.
    """

    statement: str
    question: str
    several: str
    number: bool
    held_out: bool = False

    def value(self, words: WordSource) -> str:
        """A new value of the right kind."""
        return words.number() if self.number else words.word()


def _wording(statement: str, verb: str, number: bool, held_out: bool = False) -> Wording:
    """`The code of the {k}` and `is`: what is asked for is the statement's subject."""
    subject = statement.replace("The ", "the ", 1)
    several = f"What is {subject.replace('the {k}', 'each of these')}: {{k}}?"
    return Wording(f"{statement} {verb}", f"What is {subject}?", several, number, held_out)


WORDINGS = (
    _wording("The code of the {k}", "is", number=True),
    _wording("The number of the {k}", "is", number=True),
    _wording("The password for the {k}", "is", number=True),
    _wording("The price of the {k}", "is", number=True),
    _wording("The special magic number for the {k}", "is", number=True),
    _wording("The weight of the {k} in grams", "was", number=True),
    _wording("The phone number written on the {k}", "is", number=True),
    _wording("The secret word of the {k}", "is", number=False),
    _wording("The sign on the {k}", "says", number=False),
    _wording("The name of the {k}", "is", number=False),
    _wording("The thing hidden in the {k}", "is", number=False),
    _wording("The picture on the {k}", "shows", number=False),
    _wording("The smell of the {k}", "is that of", number=False),
    _wording("The gift inside the {k}", "was", number=False),
    _wording("The telephone code of the {k}", "is", number=True, held_out=True),
    _wording("The secret number behind the {k}", "was", number=True, held_out=True),
    _wording("The year written on the {k}", "is", number=True, held_out=True),
    _wording("The word painted on the {k}", "is", number=False, held_out=True),
    _wording("The thing behind the {k}", "was", number=False, held_out=True),
)


@cache
def wordings(held_out: bool) -> tuple[Wording, ...]:
    """Those of one side of the split."""
    return tuple(wording for wording in WORDINGS if wording.held_out == held_out)


@dataclass(frozen=True)
class Needles(Task):
    """One wording with `n_keys` keys, of which `n_queries` are asked for in one question.

    Args:
        n_keys: how many needles are hidden.
        n_queries: how many of them the answer must have.
    """

    name: str
    n_keys: int
    n_queries: int = 1

    def puzzle(self, words: WordSource) -> Puzzle:
        return self.puzzles(words, 1)[0]

    def puzzles(self, words: WordSource, n: int) -> list[Puzzle]:
        """`n` questions about the same needles, which the first puzzle hides; each asks for others, as far as there are."""
        wording = pick(words.rng, wordings(words.held_out))
        needles = [(words.key(), wording.value(words)) for _ in range(self.n_keys)]
        statements = tuple(f"{wording.statement.format(k=key)} {value}." for key, value in needles)
        starts = range(0, min(n * self.n_queries, self.n_keys - self.n_queries + 1), self.n_queries)
        return [
            Puzzle(statements if start == 0 else (), *_ask(wording, needles[start : start + self.n_queries])) for start in starts
        ]


def _ask(wording: Wording, asked: list[tuple[str, str]]) -> tuple[str, tuple[Piece, ...]]:
    """The question for these (key, value), and the answer."""
    if len(asked) == 1:
        question = wording.question.format(k=asked[0][0])
    else:
        question = wording.several.format(k=", ".join(f"the {key}" for key, _ in asked))
    answer: list[Piece] = []
    for i, (key, value) in enumerate(asked):
        said = wording.statement.format(k=key)
        answer += [Piece(f". {said}" if i else said), Piece(f" {value}", looked_up=True)]
    return question, (*answer, Piece("."))
