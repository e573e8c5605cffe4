"""What every task has: a name, and puzzles."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lt_gguf.evaluation.puzzle import Puzzle
from lt_gguf.evaluation.words import WordSource


class Task(ABC):
    """Makes puzzles of one kind."""

    name: str

    @abstractmethod
    def puzzle(self, words: WordSource) -> Puzzle:
        """A new one, of words that `words` hasn't given before."""
