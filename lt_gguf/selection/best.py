"""`auto`: what several strategies choose is run, and the best measured of them is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lt_gguf.selection.base import Request, Selection, Strategy
from lt_gguf.selection.evidence import Candidate
from lt_gguf.selection.frequency import Frequency
from lt_gguf.selection.interleave import InterleaveEven, InterleaveOdd
from lt_gguf.selection.kl import Kl
from lt_gguf.selection.lazy_ratio import LazyRatio
from lt_gguf.statistics import paired_difference


class Auto(Strategy):
    """The best measured of what `lazy-ratio`, `frequency`, `interleave-odd`, `interleave-even` and `kl` choose.

    They are compared on prompts that none of them chose by. The runs are those of `kl`, and one for each that differs from
    the others, beside the full model.
    """

    name = "auto"
    needs_ratios = True
    measures_hybrid = True

    def __init__(self) -> None:
        self.kl = Kl()
        self.strategies: tuple[Strategy, ...] = (LazyRatio(), Frequency(), InterleaveOdd(), InterleaveEven(), self.kl)

    def runs(self, request: Request) -> tuple[int, int]:
        return self.kl.runs(request)[0], 1 + len(self.strategies)

    def choose(self, request: Request) -> Selection:
        assert request.candidates is not None
        selections = [each.choose(request) for each in self.strategies]
        bench = request.candidates.judging
        full = Candidate("full", (), bench.measure(()))
        measured = bench.measure_all([found.layers for found in selections])
        candidates = [Candidate(found.strategy, found.layers, evidence) for found, evidence in zip(selections, measured)]
        chosen = best(candidates)
        reason = (
            f"as {chosen.name} chooses, the best measured of {len(candidates)} candidates: {chosen.evidence.accuracy:.1%} of "
            f"what {len(full.evidence.scores)} questions ask for is found, {full.evidence.accuracy:.1%} by the full model, "
            f"and the KL divergence is {chosen.evidence.kl:.2g} nats"
        )
        found = self.selection(request, chosen.layers, reason)
        return replace(found, candidates=(full, *candidates), measurement=request.candidates.measurement)


def best(candidates: Sequence[Candidate]) -> Candidate:
    """Of those that don't find clearly less than the one that finds most, the one with the smallest KL divergence.

    Clearly: the difference of their scores, puzzle by puzzle, is above 0 with all of its 95 % interval. A few dozen puzzles tell
    apart what loses the far context from what doesn't; between two that keep it, the divergence tells more.
    """
    finder = max(candidates, key=lambda candidate: candidate.evidence.accuracy)
    as_good = [candidate for candidate in candidates if not _is_clearly_less(candidate, finder)]
    return min(as_good, key=lambda candidate: candidate.evidence.kl)


def _is_clearly_less(candidate: Candidate, finder: Candidate) -> bool:
    _, low, _ = paired_difference(finder.evidence.scores, candidate.evidence.scores)
    return low > 0
