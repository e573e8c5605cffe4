"""Candidates for the streaming layers whose quality is made up: what strategies that measure are tested with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lt_gguf.selection.evidence import Evidence, Measurement

Layers = tuple[int, ...]


def evidence(kl: float, *scores: float) -> Evidence:
    return Evidence(kl, kl, scores or (1.0,))


@dataclass
class FakeBench:
    """Gives the evidence that a function says, and remembers what it was asked."""

    of: Callable[[Layers], Evidence]
    asked: list[Layers] = field(default_factory=list)

    def measure(self, layers: Layers) -> Evidence:
        if layers not in self.asked:
            self.asked.append(layers)
        return self.of(layers)


@dataclass
class FakeCandidates:
    choosing: FakeBench
    judging: FakeBench
    announced: list[int] = field(default_factory=list)

    def announce(self, runs: int) -> None:
        assert not self.choosing.asked and not self.judging.asked
        self.announced.append(runs)

    @property
    def measurement(self) -> Measurement:
        runs = len(self.choosing.asked) + len(self.judging.asked)
        return Measurement("book.txt", "0123456789abcdef", 2, 3, 100, runs, 5 * runs, 500 * runs)


def candidates(choosing: Callable[[Layers], Evidence], judging: Callable[[Layers], Evidence] | None = None) -> FakeCandidates:
    return FakeCandidates(FakeBench(choosing), FakeBench(judging or choosing))
