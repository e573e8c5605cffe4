"""Stories from a small grammar: endless text of this project's own to hide needles in, and to train a small model on."""

from __future__ import annotations

import numpy as np

from lt_gguf.evaluation.words import ADJECTIVES, ANIMALS, FOODS, NAMES, NOUNS, PLACES, pick

_MOODS = "happy sad tired proud hungry calm brave curious".split()
_TIMES = ["in the morning", "in the evening", "at noon", "one day", "on a rainy day", "on a sunny day", "late at night"]
_EVENTS = [
    "{n} found the {a} {o} near the {p}. The {a} {o} belonged to {m}.",
    "{n} met a {c}. The {c} was {d}, so {n} gave it some {f}.",
    "{n} and {m} walked to the {p}. They looked for the {a} {o}, but they did not find it.",
    "{n} carried the {a} {o} to the {p}. It was heavy, and {n} was soon tired.",
    "A {c} came out of the {p}. {m} was afraid of it, but {n} was not.",
    "{n} was hungry. {m} had some {f} and shared it with {n}.",
    "It began to rain. {n} and {m} ran to the {p} and waited there.",
    '{n} asked {m} about the {a} {o}. "I left it at the {p}," said {m}.',
    '"Where is the {c}?" asked {n}. "It is at the {p}," said {m}.',
    "{m} sold {f} at the {p}. {n} bought some and ate it at once.",
    "{n} wanted to see the {p}. {m} knew the way and went with {n}.",
    "The {c} took the {f} from {n} and ran away. {n} laughed, and {m} laughed too.",
]
_OPENINGS = [
    "{n} lived near the {p} with a {c}.",
    "{t}, {n} went to the {p}.",
    "Once there was a {c} that lived by the {p}. Its best friend was {n}.",
    "{n} and {m} were good friends. {t}, they met at the {p}.",
    "{n} owned the {a} {o}. {n} liked it more than anything else.",
]
_ENDINGS = [
    "At the end of the day {n} was {d}, and {m} was {d} too.",
    "Then {n} went home and slept well.",
    "From that day on, {n} and the {c} were friends.",
    "{n} thanked {m} and went back to the {p}.",
    "That is how {n} learned to share.",
]


def story_sentences(rng: np.random.Generator, n_events: int | None = None) -> list[str]:
    """The sentences of a story about two people: the same people, animal and things from the first to the last."""
    n, m = (str(name) for name in rng.choice(NAMES, 2, replace=False))
    cast = {
        "n": n, "m": m, "c": pick(rng, ANIMALS), "a": pick(rng, ADJECTIVES), "o": pick(rng, NOUNS), "p": pick(rng, PLACES),
        "d": pick(rng, _MOODS), "f": pick(rng, FOODS), "t": pick(rng, _TIMES),
    }  # fmt: skip
    n_events = int(rng.integers(2, 6)) if n_events is None else n_events
    events = [_EVENTS[i] for i in rng.permutation(len(_EVENTS))[:n_events]]
    sentences = []
    for template in [pick(rng, _OPENINGS), *events, pick(rng, _ENDINGS)]:
        if rng.random() < 0.25:  # the people change roles, the cast stays
            cast["n"], cast["m"] = cast["m"], cast["n"]
        for sentence in template.format(**cast).removesuffix(".").split(". "):
            sentences.append(sentence[0].upper() + sentence[1:] + ".")
    return sentences


def story(rng: np.random.Generator, n_events: int | None = None) -> str:
    """The same in one line."""
    return " ".join(story_sentences(rng, n_events))
