"""Facts to hide in a text and to ask for: kinds that layers are chosen by, and other kinds that the choice is judged by.

Values are drawn at random, so that no model knows them but from the text. The keys are not those that an evaluation asks for
(`words.keys(held_out=True)`), and neither are the wordings: what is chosen with these facts can be evaluated there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lt_gguf.evaluation.puzzle import Piece, Puzzle
from lt_gguf.evaluation.words import NAMES, WordSource, pick

_SURNAMES = """Ackerman Birch Calloway Draper Ellison Fairchild Garrick Holloway Ingram Jessop Kendrick Lockwood Merriam Norcross
Ormond Pemberton Quimby Rowntree Stanhope Thackeray Underhill Vickers Whitlock Yardley""".split()
_TOWN_BEGINNINGS = "Ash Brack Cold Dun Elm Farn Glen Hart Inch Kel Lang Mar Nor Oak Pen Rav Stan Thorn Ux Wych".split()
_TOWN_ENDINGS = "bury combe dale ford ham leigh minster mouth port stead ton wick worth".split()
_MONTHS = "January February March April May June July August September October November December".split()
_N_SAID = 4  # words


@dataclass(frozen=True)
class FactKind:
    """Facts of one kind.

    Args:
        name: of the kind, for reports.
        wordings: how such a fact is said, up to its value, and asked for; {k} is its key.
        value: draws a value.
    """

    name: str
    wordings: tuple[tuple[str, str], ...]
    value: Callable[[WordSource], str]

    def fact(self, words: WordSource) -> Puzzle:
        """A new one. The answer begins as the statement does; that part is given."""
        statement, question = pick(words.rng, self.wordings)
        key = words.key()
        said, value = statement.format(k=key), self.value(words)
        return Puzzle((f"{said} {value}.",), question.format(k=key), (Piece(said), Piece(f" {value}", looked_up=True), Piece(".")))


def _person(words: WordSource) -> str:
    return f"{pick(words.rng, NAMES)} {pick(words.rng, _SURNAMES)}"


def _town(words: WordSource) -> str:
    return pick(words.rng, _TOWN_BEGINNINGS) + pick(words.rng, _TOWN_ENDINGS)


def _date(words: WordSource) -> str:
    return f"{words.rng.integers(1, 29)} {pick(words.rng, _MONTHS)} {words.rng.integers(1700, 2000)}"


def _said(words: WordSource) -> str:
    return " ".join(words.word() for _ in range(_N_SAID))


NUMBERS = FactKind(
    "number",
    (
        ("The access code for the {k} is", "What is the access code for the {k}?"),
        ("The {k} carries the serial number", "Which serial number does the {k} carry?"),
        ("The {k} is entry number", "Which entry number is the {k}?"),
    ),
    WordSource.number,
)
PEOPLE = FactKind(
    "name",
    (
        ("The {k} belongs to", "Who does the {k} belong to?"),
        ("The {k} was repaired by", "Who was the {k} repaired by?"),
        ("The person in charge of the {k} is", "Who is the person in charge of the {k}?"),
    ),
    _person,
)
PLACES = FactKind(
    "place",
    (
        ("The {k} was taken to", "Where was the {k} taken to?"),
        ("The home of the {k} is", "Where is the home of the {k}?"),
        ("The {k} can be seen in", "Where can the {k} be seen?"),
    ),
    _town,
)
DATES = FactKind(
    "date",
    (
        ("The {k} was sold on", "When was the {k} sold?"),
        ("The first picture of the {k} dates from", "When does the first picture of the {k} date from?"),
    ),
    _date,
)
SAYINGS = FactKind(
    "words",
    (
        ("On the {k} these words are carved:", "Which words are carved on the {k}?"),
        ("To open the {k} one has to say:", "What does one have to say to open the {k}?"),
    ),
    _said,
)

PASSAGE = "passage"  # a sentence of the text itself, of which the beginning is quoted

CHOOSING: Mapping[str, FactKind | None] = {"number": NUMBERS, "name": PEOPLE, PASSAGE: None}
JUDGING: Mapping[str, FactKind | None] = {"place": PLACES, "date": DATES, "words": SAYINGS}

_QUOTED, _CONTINUED = 6, 6  # words of a passage that are quoted, and that are to follow


def passage(filler: list[str], places: np.ndarray, rng: np.random.Generator) -> tuple[int, Puzzle] | None:
    """Asks for a sentence of the text itself, word for word.

    Args:
        filler: the sentences of the text.
        places: which of them may be asked for.

    Returns:
        which one it is, and the question; `None` if none is long enough and unlike all others.
    """
    text = " ".join(filler)
    for i in rng.permutation(places).tolist():
        words = filler[i].split()
        quoted, rest = " ".join(words[:_QUOTED]), " ".join(words[_QUOTED : _QUOTED + _CONTINUED])
        if len(words) >= _QUOTED + _CONTINUED and text.count(quoted) == 1:
            question = f'One sentence of the text begins with "{quoted}". Repeat that sentence word for word.'
            return i, Puzzle((filler[i],), question, (Piece(quoted), Piece(f" {rest}", looked_up=True)))
    return None
