"""A puzzle: sentences to hide in a haystack, a question about them, and its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Piece:
    """A part of an answer: what anyone who knows the question could say, or what can only be looked up in the text."""

    text: str
    looked_up: bool = False


@dataclass(frozen=True)
class Puzzle:
    """What a task asks.

    Args:
        statements: whole sentences to hide; where only one is asked for, it is the first.
        question: one sentence.
        answer: its pieces in order; the first is its beginning, which is given to the model (as in RULER, arXiv 2404.06654),
            so that what counts is whether it finds the rest.
        ordered: whether the statements make sense in this order only.
    """

    statements: tuple[str, ...]
    question: str
    answer: tuple[Piece, ...]
    ordered: bool = False

    def __post_init__(self) -> None:
        assert self.answer and not self.answer[0].looked_up and self.expected

    @property
    def prefix(self) -> str:
        """The given beginning of the answer, without a space at its end."""
        return self.answer[0].text

    @property
    def expected(self) -> tuple[str, ...]:
        """What the rest of the answer must contain."""
        return tuple(piece.text.strip() for piece in self.answer if piece.looked_up)

    @property
    def rest(self) -> str:
        """The answer after its given beginning."""
        return "".join(piece.text for piece in self.answer[1:])

    def score(self, text: str) -> float:
        """Share of `expected` that `text`, what the model wrote after `prefix`, contains (RULER's string match)."""
        return sum(expected in text for expected in self.expected) / len(self.expected)


@dataclass(frozen=True)
class Part:
    """A sentence of a prompt; `hidden`: one of a puzzle, not of the haystack."""

    text: str
    hidden: bool


def hide(rng: np.random.Generator, filler: Sequence[str], puzzles: Sequence[Puzzle], depth: float | None = None) -> Iterator[Part]:
    """The filler with the statements of all puzzles in it, each place as likely.

    Args:
        depth: where the first statement of the first puzzle stands: 0, before all filler, to 1, after it; `None`: anywhere.
    """
    placed: list[tuple[int, float, str]] = []  # (number of filler sentences before it, tie-break, statement)
    for i, puzzle in enumerate(puzzles):
        n = len(puzzle.statements)
        places, ties = rng.integers(0, len(filler) + 1, n), rng.random(n)
        if puzzle.ordered:
            places, ties = np.sort(places), np.sort(ties)
        if i == 0 and depth is not None:
            places[0] = round(depth * len(filler))
            places = np.maximum.accumulate(places) if puzzle.ordered else places
        placed += zip(places.tolist(), ties.tolist(), puzzle.statements, strict=True)
    placed.sort()
    taken = 0
    for i in range(len(filler) + 1):
        while taken < len(placed) and placed[taken][0] == i:
            yield Part(placed[taken][2], hidden=True)
            taken += 1
        if i < len(filler):
            yield Part(filler[i], hidden=False)
