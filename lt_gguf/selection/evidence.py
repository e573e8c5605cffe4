"""What was measured of candidates, sets of layers that might stream: how much of what the full model knows they lose.

The loss of a set is measured on probes: tokens that follow a prompt which the streaming layers don't see all of any more. Each is
asked of the full model and of the hybrid, with the same tokens before it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from lt_gguf.spec.cache_types import CacheTypes
from lt_gguf.statistics import Estimate, lost_share, mean_interval

TEXT, FIRST, LATER = "text", "first", "later"
WHERE = (TEXT, FIRST, LATER)

LEAST_KNOWN = 0.05  # below that, what the full model finds says nothing


@dataclass(frozen=True)
class Outcome:
    """What became of one probe.

    Args:
        where: `text`: the text goes on; `first`: the answer to a question in the first message, which is read with full attention
            beside the text; `later`: to one in a later message, which the hybrid reads.
        kind: of the question, or `text`.
        length: tokens of the conversation that it belongs to.
        prompt: number of that conversation; its probes are not independent of each other.
        kl: KL divergence full || hybrid of the next token's distribution, in nats, mean over the tokens that are compared.
        known: what the full model finds: over the tokens, the mean of its probability where it is right, that is where it finds the
            token that stands there most likely, and of 0 elsewhere.
        found: what the hybrid finds of that: the mean of the full model's probability where the hybrid is right.
        hit: whether the hybrid finds each of them most likely.
    """

    where: str
    kind: str
    length: int
    prompt: int
    kl: float
    known: float
    found: float
    hit: bool


@dataclass(frozen=True)
class Evidence:
    """What was measured of one set of layers. What the full model itself doesn't know counts as little as it is known.

    Args:
        outcomes: at least one of an answer.
    """

    outcomes: tuple[Outcome, ...]

    @cached_property
    def answers(self) -> tuple[Outcome, ...]:
        """Those of questions."""
        return tuple(outcome for outcome in self.outcomes if outcome.where != TEXT)

    @property
    def known(self) -> float:
        """How much of the answers the full model finds, from 0 to 1."""
        return _mean([outcome.known for outcome in self.answers])

    @property
    def is_informed(self) -> bool:
        """Whether the full model finds enough for a loss to say something."""
        return self.known >= LEAST_KNOWN

    @cached_property
    def loss(self) -> Estimate:
        """The share of what the full model finds that the hybrid doesn't, with an interval over conversations; below 0: it finds more.
        NaN if the full model finds nothing."""
        return self.loss_where(FIRST, LATER)

    def loss_where(self, *where: str) -> Estimate:
        """The same of some of the answers."""
        answers = self.among(*where)
        known, found = (_means(answers, [getattr(outcome, name) for outcome in answers]) for name in ("known", "found"))
        if not any(known):
            return Estimate(math.nan, math.nan, math.nan)
        return lost_share(known, found)

    def kl_where(self, *where: str) -> Estimate:
        """The mean divergence of some of the probes with an interval over conversations, in nats; NaN if there are none."""
        outcomes = self.among(*where)
        if not outcomes:
            return Estimate(math.nan, math.nan, math.nan)
        # note: a model that finds nothing still says how far its predictions change
        weights = [outcome.known if outcome.where != TEXT and self.is_informed else 1.0 for outcome in outcomes]
        scale = len(outcomes) / math.fsum(weights)
        values = _means(outcomes, [scale * weight * outcome.kl for weight, outcome in zip(weights, outcomes)])
        return mean_interval(values, limits=(0.0, math.inf))

    @property
    def kl_text(self) -> float:
        return self.kl_where(TEXT).value

    @property
    def kl_answer(self) -> float:
        """Of questions, wherever they are asked, so that a first one counts as much as a later one."""
        return _mean([kl for kl in (self.kl_where(where).value for where in (FIRST, LATER)) if not math.isnan(kl)])

    @cached_property
    def kl(self) -> float:
        """One number for all: a layer must neither change the text nor lose what is far away, whenever it is asked for."""
        return _mean([kl for kl in (self.kl_where(where).value for where in WHERE) if not math.isnan(kl)])

    @property
    def scores(self) -> tuple[float, ...]:
        """For each answer 1 if it is found, else 0."""
        return tuple(float(outcome.hit) for outcome in self.answers)

    @property
    def accuracy(self) -> float:
        """The share of the answers that are found."""
        return _mean(self.scores)

    @property
    def worst(self) -> Outcome:
        """The answer that most is lost of."""
        return max(self.answers, key=lambda outcome: outcome.known - outcome.found)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of its conversations, ascending."""
        return tuple(sorted({outcome.length for outcome in self.outcomes}))

    def of_length(self, length: int) -> Evidence:
        """What was measured with conversations of that length."""
        return Evidence(tuple(outcome for outcome in self.outcomes if outcome.length == length))

    def among(self, *where: str) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.where in where)


def _means(outcomes: Sequence[Outcome], values: Iterable[float]) -> list[float]:
    """The mean over each conversation, all of which have as many outcomes."""
    of_prompt: dict[int, list[float]] = defaultdict(list)
    for outcome, value in zip(outcomes, values, strict=True):
        of_prompt[outcome.prompt].append(value)
    return [_mean(found) for found in of_prompt.values()]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@dataclass(frozen=True)
class Candidate:
    """Layers that might stream, what proposed them, and what was measured with them."""

    name: str
    layers: tuple[int, ...]
    evidence: Evidence


@dataclass(frozen=True)
class Measurement:
    """What candidates were measured on, and what that took.

    Args:
        data: name of the calibration text.
        sha256: of its bytes.
        conversations: with a text in the first message and two questions each, to choose by; twice as many others to judge by.
        lengths: of them, in tokens; of a second one are the `long` ones.
        sets: sets of layers that were measured, the full model included.
        read: tokens of prompts that were read with full attention, for all sets together.
        computed: tokens that were computed for the sets.
        long: further conversations to judge by.
    """

    data: str
    sha256: str
    conversations: int
    lengths: tuple[int, ...]
    sets: int
    read: int
    computed: int
    long: int = 0

    @property
    def judged(self) -> str:
        """How many conversations there are to judge by, and of what length, in words."""
        if not self.long:
            return f"{2 * self.conversations} of {' and '.join(f'{length:,}' for length in self.lengths)} tokens"
        return f"{2 * self.conversations} of {self.lengths[0]:,} and {self.long} of {self.lengths[-1]:,} tokens"

    def __str__(self) -> str:
        asked = f"{self.conversations} conversations to choose by, and {self.judged} to judge by"
        computed = f"{self.sets} sets of layers, {self.read:,} tokens read and {self.computed:,} computed for the sets"
        return f"{asked}, from {self.data} (sha256 {self.sha256[:12]}); {computed}"


class Bench(Protocol):
    """Measures sets of streaming layers on the same probes; the empty set is the full model."""

    def measure(self, layers: tuple[int, ...]) -> Evidence: ...

    def measure_all(self, sets: Sequence[tuple[int, ...]]) -> list[Evidence]:
        """The same for many sets, for which a prompt is read once."""


class Candidates(Protocol):
    """What a strategy that measures the hybrid itself is given.

    `judging` has questions of other kinds than `choosing`: what was chosen because it did well on some is judged on others.
    """

    @property
    def choosing(self) -> Bench: ...

    @property
    def judging(self) -> Bench: ...

    def with_window(self, window: int) -> Candidates:
        """The same questions for streaming layers with another window."""

    def announce(self, choosing: int, judging: int) -> None:
        """Says about how many sets will be measured, before they are."""

    def judge_with_cache(self, types: CacheTypes, layers: tuple[int, ...]) -> Evidence:
        """What these layers lose on the questions to judge by when the cache of the others has these types."""

    def announce_caches(self, n: int) -> None:
        """Says how many times that will be measured, before it is."""

    @property
    def measurement(self) -> Measurement:
        """What has been measured until now."""
