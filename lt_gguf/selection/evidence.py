"""What was measured of candidates, sets of layers that might stream, on the hybrid model itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Evidence:
    """How far a hybrid is from its full model on calibration prompts, and how well it finds things in them.

    Args:
        kl_text: KL divergence full || hybrid of the next token's distribution, in nats, mean over tokens of texts.
        kl_answer: the same over those tokens of answers that can only be looked up in the prompt.
        scores: for each puzzle the share of what is to be looked up that the model finds, from 0 to 1.
    """

    kl_text: float
    kl_answer: float
    scores: tuple[float, ...]

    @property
    def kl(self) -> float:
        """One number for both: a layer must neither change the text nor lose what is far away, so half the weight each."""
        return (self.kl_text + self.kl_answer) / 2

    @property
    def accuracy(self) -> float:
        """The mean score."""
        return math.fsum(self.scores) / len(self.scores)


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
        texts: prompts that were cut out of it, each time a candidate was run.
        puzzles: generated prompts that ask for something in them, each time.
        length: tokens of a prompt and its continuation, at most.
        runs: how many times a set of layers was run on all of them, the full model included.
        prompts: read in all runs together.
        tokens: of these, with their continuations.
    """

    data: str
    sha256: str
    texts: int
    puzzles: int
    length: int
    runs: int
    prompts: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.texts} texts ({self.data}, sha256 {self.sha256[:12]}) and {self.puzzles} puzzles of up to {self.length:,} "
            f"tokens; {self.runs} runs, {self.prompts:,} prompts, {self.tokens:,} tokens"
        )


class Bench(Protocol):
    """Measures sets of streaming layers on the same prompts; the empty set is the full model."""

    def measure(self, layers: tuple[int, ...]) -> Evidence: ...


class Candidates(Protocol):
    """What a strategy that measures the hybrid itself is given.

    `judging` has other prompts than `choosing`: what was chosen because it did well on some prompts is judged on others.
    """

    @property
    def choosing(self) -> Bench: ...

    @property
    def judging(self) -> Bench: ...

    def announce(self, runs: int) -> None:
        """Says what is about to be run at most, before it is."""

    @property
    def measurement(self) -> Measurement:
        """What has been measured until now."""
