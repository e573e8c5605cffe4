"""Candidates for the streaming layers whose quality is made up: what strategies that measure are tested with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lt_gguf.selection.evidence import FIRST, TEXT, Evidence, Measurement, Outcome
from lt_gguf.spec.cache_types import CacheTypes

Layers = tuple[int, ...]


def evidence(kl: float, *found: float, kl_text: float | None = None) -> Evidence:
    """Of one text, and of a question for each number, the share that is found of an answer that the full model knows."""
    text = Outcome(TEXT, TEXT, 100, 0, kl if kl_text is None else kl_text, 1.0, 1.0, True)
    return Evidence(
        (text, *(Outcome(FIRST, "number", 100, i, kl, 1.0, share, share == 1) for i, share in enumerate(found or (1.0,))))
    )


@dataclass
class FakeBench:
    """Gives the evidence that a function says, and remembers what it was asked."""

    of: Callable[[Layers], Evidence]
    asked: list[Layers] = field(default_factory=list)

    def measure(self, layers: Layers) -> Evidence:
        if layers not in self.asked:
            self.asked.append(layers)
        return self.of(layers)

    def measure_all(self, sets: Sequence[Layers]) -> list[Evidence]:
        return [self.measure(layers) for layers in sets]


@dataclass
class FakeCandidates:
    choosing: FakeBench
    judging: FakeBench
    announced: list[tuple[int, int]] = field(default_factory=list)
    others: dict[int, FakeCandidates] = field(default_factory=dict)  # by window

    def with_window(self, window: int) -> FakeCandidates:
        return self.others[window]

    with_cache: Callable[[CacheTypes, Layers], Evidence] | None = None
    caches_announced: int = 0

    def judge_with_cache(self, types: CacheTypes, layers: Layers) -> Evidence:
        assert self.with_cache is not None
        return self.with_cache(types, layers)

    def announce_caches(self, n: int) -> None:
        self.caches_announced = n

    def announce(self, choosing: int, judging: int) -> None:
        assert not self.choosing.asked and not self.judging.asked
        self.announced.append((choosing, judging))

    @property
    def measurement(self) -> Measurement:
        sets = len(self.choosing.asked) + len(self.judging.asked)
        return Measurement("book.txt", "0123456789abcdef", 3, (100, 400), sets, 500, 5 * sets, long=2)


def candidates(choosing: Callable[[Layers], Evidence], judging: Callable[[Layers], Evidence] | None = None) -> FakeCandidates:
    return FakeCandidates(FakeBench(choosing), FakeBench(judging or choosing))
