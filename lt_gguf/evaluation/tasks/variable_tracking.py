"""Variable tracking (RULER, arXiv 2404.06654, section 3.2): a value is stored in a variable, which is copied to another, ..."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from lt_gguf.evaluation.puzzle import Piece, Puzzle
from lt_gguf.evaluation.tasks.base import Task
from lt_gguf.evaluation.words import WordSource


@dataclass(frozen=True)
class VariableTracking(Task):
    """A chain of `n_hops` copies, asked for as a whole, beside `n_chains - 1` others."""

    name: str = "variable-tracking"
    n_hops: int = 3
    n_chains: int = 2

    def puzzle(self, words: WordSource) -> Puzzle:
        chains = [(words.number(), [words.variable() for _ in range(self.n_hops + 1)]) for _ in range(self.n_chains)]
        statements = [self._statements(value, variables) for value, variables in chains]
        value, variables = chains[0]
        answer = [Piece(f"The value {value} is stored in")]
        for i, variable in enumerate(variables):
            answer += [Piece(",")] if i else []
            answer.append(Piece(f" {variable}", looked_up=True))
        mixed = _mix(words, statements)
        return Puzzle(mixed, f"Which variables hold the value {value}?", (*answer, Piece(".")), ordered=True)

    @staticmethod
    def _statements(value: str, variables: list[str]) -> list[str]:
        copies = [f"The variable {a} is copied to {b}." for a, b in itertools.pairwise(variables)]
        return [f"The value {value} is stored in {variables[0]}.", *copies]


def _mix(words: WordSource, chains: list[list[str]]) -> tuple[str, ...]:
    """The sentences of all chains, those of each in their order."""
    turns = [i for i, chain in enumerate(chains) for _ in chain]
    words.rng.shuffle(turns)
    left = [iter(chain) for chain in chains]
    return tuple(next(left[i]) for i in turns)
