"""The words that prompts of the evaluation are made of, and which of them a model trained here never sees together.

The lists are this project's own. A *key* is an adjective and a noun (`red lighthouse`); every tenth one, by its checksum, is
held out: training data is made of the others, evaluations ask for these, so a model that answers has not learned the key.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")

NAMES = """Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mary Noah Olga Paul Rosa Sam Tina Victor
Alice Bruno Carl Diana Edgar Fiona George Helen Ivan Julia Karl Laura Martin Nina Oscar Peter Ruth Simon Tom
Vera""".split()
ADJECTIVES = """red blue green white black tall new small large quiet golden silver wooden round broken hidden old narrow
heavy bright dark empty painted square yellow grey crooked shiny dusty tiny""".split()
NOUNS = """lighthouse bridge garden tower house mill boat clock box door window table lamp chair ship train key bag book bell
cup map ring shop wall gate barrel statue fountain cabin drawer basket ladder mirror museum theatre bottle bench""".split()
ANIMALS = "cat dog horse cow goat duck fox wolf bear mouse rabbit sheep".split()
PLACES = "river forest village market harbour school library station castle island mountain valley".split()
FOODS = "bread soup cheese apples cake fish rice honey milk pears nuts tea".split()
VALUES = """stone cloud silk amber maple copper velvet winter summer thunder paper salt ivory olive cotton iron
pepper ginger lemon marble coral tulip falcon rocket candle pillow hammer orange purple brown
pink glass wool sugar coffee needle saddle violin guitar drum feather button carpet blanket
anchor engine wagon tunnel temple palace desert meadow canyon glacier comet planet moon star""".split()

HELD_OUT_EVERY = 10
NUMBER_DIGITS = 5
VARIABLE_LETTERS = 3


def is_held_out(text: str, every: int) -> bool:
    """A split that depends on the text alone, so that it is the same in every run and on every machine."""
    return zlib.crc32(text.encode()) % every == 0


@cache
def keys(held_out: bool) -> tuple[str, ...]:
    """All keys of one side of the split."""
    all_keys = (f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)
    return tuple(key for key in all_keys if is_held_out(key, HELD_OUT_EVERY) == held_out)


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of `items`, each as likely."""
    return items[int(rng.integers(len(items)))]


@dataclass
class WordSource:
    """Draws keys, numbers, words and variables for one prompt; none of them twice, so that no answer is right by chance.

    Args:
        held_out: whether keys are those that training data never has.
    """

    rng: np.random.Generator
    held_out: bool
    used: set[str] = field(default_factory=set)

    def key(self) -> str:
        """Like `red lighthouse`."""
        return self._new(lambda: pick(self.rng, keys(self.held_out)))

    def number(self) -> str:
        """`NUMBER_DIGITS` digits, the first of them not 0."""
        return self._new(lambda: str(self.rng.integers(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS)))

    def word(self) -> str:
        """One of `VALUES`; again only where a prompt needs more than there are."""
        if self.used.issuperset(VALUES):
            self.used.difference_update(VALUES)
        return self._new(lambda: pick(self.rng, VALUES))

    def variable(self) -> str:
        """Like `AQX`."""
        letters = string.ascii_uppercase
        return self._new(lambda: "".join(pick(self.rng, letters) for _ in range(VARIABLE_LETTERS)))

    def animals(self, n: int) -> list[str]:
        """`n` different animals."""
        return [str(animal) for animal in self.rng.choice(ANIMALS, n, replace=False)]

    def _new(self, draw: Callable[[], str]) -> str:
        for _ in range(10_000):
            if (text := draw()) not in self.used:
                self.used.add(text)
                return text
        raise ValueError("a prompt needs more different keys, numbers or variables than there are: ask for fewer needles")
