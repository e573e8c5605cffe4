"""Aggregation (as RULER's frequent words, arXiv 2404.06654, section 3.3): what was said most often, spread over the text."""

from __future__ import annotations

from dataclasses import dataclass

from lt_gguf.evaluation.puzzle import Piece, Puzzle
from lt_gguf.evaluation.tasks.base import Task
from lt_gguf.evaluation.words import NAMES, WordSource, pick


@dataclass(frozen=True)
class Votes(Task):
    """Votes for some animals; the one with the most is asked for.

    Args:
        most: votes for that one.
        others: votes for each of the others, at least two fewer.
    """

    name: str = "votes"
    most: int = 12
    others: tuple[int, ...] = (4, 3, 2)

    def puzzle(self, words: WordSource) -> Puzzle:
        animals = words.animals(1 + len(self.others))
        ballots = [animal for animal, n in zip(animals, (self.most, *self.others)) for _ in range(n)]
        words.rng.shuffle(ballots)
        statements = tuple(f"{pick(words.rng, NAMES)} votes for the {animal}." for animal in ballots)
        answer = (Piece("Most votes went to the"), Piece(f" {animals[0]}", looked_up=True), Piece("."))
        return Puzzle(statements, "Which animal got the most votes?", answer)
