"""What needles are hidden in: sentences of stories, or of texts that the user gives."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lt_gguf.evaluation.stories import story_sentences
from lt_gguf.evaluation.words import pick

_LONGEST = 400  # characters; a table or a listing is cut, so that prompts come near to their length
_BETWEEN_PARAGRAPHS = re.compile(r"\n[ \t\r]*\n")
_BETWEEN_SENTENCES = re.compile(r"""(?<=[.!?])\s+|(?<=[.!?]["'”’)\]])\s+|(?<=[。！？])""")


@dataclass(frozen=True)
class Haystack:
    """An endless source of sentences.

    Args:
        texts: documents whose lines come among the stories.
        share: of the passages, how many are from `texts`; 0: stories only, 1: texts only.
        passage: how many lines are taken from one place: few, for a mixture, or as many as follow there.
    """

    texts: Sequence[str] = ()
    share: float = 0.0
    passage: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share of texts = {self.share}: must be from 0 to 1")
        if self.share and not any(text.strip() for text in self.texts):
            raise ValueError("haystack: its texts are empty, must be text to hide needles in")

    def sentences(self, rng: np.random.Generator) -> Iterator[str]:
        """Sentences or lines, without whitespace around them, never an empty one."""
        while True:
            if self.share and rng.random() < self.share:
                lines = pick(rng, self.texts).split("\n")
                start = int(rng.integers(len(lines)))
                passage = [line.strip() for line in lines[start : start + self.passage]]
            else:
                passage = story_sentences(rng)
            yield from (sentence for sentence in passage if sentence)


def haystack_of(documents: Sequence[str]) -> Haystack:
    """A haystack of the user's texts: from a random sentence on, in their order, then from another one on.

    Raises ValueError: they are empty.
    """
    return Haystack(["\n".join(_sentences(document)) for document in documents if document.strip()], 1.0, sys.maxsize)


def _sentences(document: str) -> Iterator[str]:
    """Where a line ends says nothing (a text may be wrapped), but a paragraph's end is a sentence's too."""
    for paragraph in _BETWEEN_PARAGRAPHS.split(document):
        for sentence in _BETWEEN_SENTENCES.split(" ".join(paragraph.split())):
            yield from textwrap.wrap(sentence, _LONGEST, break_on_hyphens=False)


def take(sentences: Iterator[str], budget: int, size: Callable[[str], int]) -> list[str]:
    """As many of the next sentences as fit `budget`; `size` says how much of it one takes."""
    taken: list[str] = []
    while True:
        sentence = next(sentences)
        budget -= size(sentence)
        if budget < 0:
            return taken
        taken.append(sentence)
