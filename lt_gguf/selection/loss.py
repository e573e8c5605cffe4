"""`loss`: as many layers stream as the model can spare, measured on the hybrid itself.

A lazy ratio says where a layer looks on average, not what the model loses: the one head that retrieves vanishes in a mean. So it is
measured what is lost when each layer streams alone; then layers are added one after the other, each time the one with which least is
lost together, and what all of them lose on other questions decides how many stream. Losses don't add up: two layers may do each
other's work, and only both together are missed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lt_gguf.selection.base import Request, Selection, Strategy
from lt_gguf.selection.evidence import Bench, Candidate, Evidence
from lt_gguf.selection.lazy_ratio import LazyRatio, laziest
from lt_gguf.selection.windows import best_window

_COMPARED = 3  # layers that are tried before one of them is added
_MOST_COMPARED = 5  # where each adds more than it was thought to
_KNOWN_FOR = 3  # additions: for so long what a layer adds is taken for known
_TRIED = 1.5  # layers that are tried for each that is added, as it came out on real models
_JUDGED = 8  # sizes that are judged before the largest one within the tolerance is looked for


class Loss(Strategy):
    """The largest set of layers whose loss, on questions of other kinds than it was chosen on, is within a tolerance.

    Where a share, a number of layers or a KV budget is asked for, it is the set of that size; the reason says what it loses then, and
    how many layers would be within the tolerance.
    """

    name = "loss"
    measures_hybrid = True
    takes_tolerance = True

    def runs(self, request: Request) -> tuple[int, int]:
        n, n_windows = request.model.n_candidates, len({request.window, *request.windows})
        judged = 1 + _JUDGED + math.ceil(math.log2(n + 1))
        return n_windows * (1 + n + math.ceil(_TRIED * n)), n_windows * (judged if request.ratios is None else 2 * judged)

    def choose(self, request: Request) -> Selection:
        return best_window(request, self._choose) if request.windows else self._choose(request)

    def _choose(self, request: Request) -> Selection:
        """With the request's own window."""
        assert request.candidates is not None
        may_stream = request.model.may_stream
        choosing, judging = request.candidates.choosing, request.candidates.judging
        full = Candidate("full", (), choosing.measure(()))
        alone = [
            Candidate(f"layer {il}", (il,), evidence)
            for il, evidence in zip(may_stream, choosing.measure_all([(il,) for il in may_stream]), strict=True)
        ]
        losses = [math.inf] * request.model.n_layer_main
        for il, candidate in zip(may_stream, alone, strict=True):
            losses[il] = candidate.evidence.kl
        path = grow(choosing, losses)
        judged = _Judged(judging, path)
        within = judged.largest(request)
        asked = request.asked_count(len(may_stream))
        n = within if asked is None else asked
        layers, evidence = path[n], judged.evidence(n)
        steps = [Candidate(f"{self.name}, {size}", path[size], judged.evidence(size)) for size in judged.sizes]
        steps += self._laziest(request, judged.sizes)
        found = self.selection(request, layers, _reason(request, judged.evidence(0), evidence, n, within, asked is not None))
        return replace(
            found,
            candidates=(full, *alone, *steps),
            measurement=request.candidates.measurement,
            warning=request.tolerance.warning(evidence, n, within),
        )

    @staticmethod
    def _laziest(request: Request, sizes: Sequence[int]) -> list[Candidate]:
        """What the paper's choice loses at the same sizes, if lazy ratios have been measured."""
        assert request.candidates is not None
        if request.ratios is None:
            return []
        mean = request.mean_ratios[: request.model.n_layer_main].tolist()
        sets = {size: laziest(mean, size) for size in sizes if 0 < size <= len(request.measured_layers)}
        measured = request.candidates.judging.measure_all(list(sets.values()))
        return [Candidate(f"{LazyRatio.name}, {size}", layers, found) for (size, layers), found in zip(sets.items(), measured)]


def grow(bench: Bench, alone: Sequence[float]) -> list[tuple[int, ...]]:
    """Sets of 0, 1, 2, ... layers, each with all of the one before it: each time the layer is added with which least is lost together.

    What a layer adds changes with the set, but not much with each layer of it. So those that seem to add least are tried where they
    weren't lately, and the best of them is added: a greedy choice at the price of a few sets for each layer. A layer that does the
    work of one that streams already falls behind by itself.

    Args:
        bench: measures sets.
        alone: the loss of each layer alone, in nats; infinite where it can't stream.
    """
    adds = list(alone)  # to the set at hand, as was measured last
    measured_at = [0] * len(alone)  # size of the set to which it was
    path: list[tuple[int, ...]] = [()]
    loss, waiting = 0.0, {il for il, loses in enumerate(alone) if loses < math.inf}

    def least(layers: Iterable[int], n: int) -> list[int]:
        # note: as elsewhere, of equal layers those with the lower numbers stay full
        return sorted(layers, key=lambda il: (adds[il], -il))[:n]

    while waiting:
        size = len(path) - 1
        tried: dict[int, float] = {}
        while len(tried) < _MOST_COMPARED:
            first, *others = least(waiting, _COMPARED)
            to_try = [il for il in (first, *others) if il not in tried and (il == first or size - measured_at[il] > _KNOWN_FOR)]
            if not to_try:
                break
            for il, found in zip(to_try, bench.measure_all([tuple(sorted((*path[-1], il))) for il in to_try])):
                tried[il] = found.kl
                adds[il], measured_at[il] = found.kl - loss, size
        (added,) = least(tried, 1)
        loss = tried[added]
        path.append(tuple(sorted((*path[-1], added))))
        waiting.remove(added)
    return path


class _Judged:
    """What the sets of a path lose on the prompts that none of them was chosen by."""

    def __init__(self, bench: Bench, path: Sequence[tuple[int, ...]]) -> None:
        self._bench, self._path = bench, path
        self._found: dict[int, Evidence] = {}
        n = len(path) - 1
        sizes = sorted({round(n * i / _JUDGED) for i in range(_JUDGED + 1)})
        self._found.update(zip(sizes, bench.measure_all([path[size] for size in sizes]), strict=True))

    @property
    def sizes(self) -> list[int]:
        """Those that have been measured, ascending."""
        return sorted(self._found)

    def evidence(self, size: int) -> Evidence:
        if size not in self._found:
            self._found[size] = self._bench.measure(self._path[size])
        return self._found[size]

    def largest(self, request: Request) -> int:
        """The largest size that is within the tolerance, if with more layers more is lost; 0: none is."""
        within = max(size for size in self.sizes if size == 0 or request.tolerance.allows(self._found[size]))
        beyond = min((size for size in self.sizes if size > within), default=within + 1)
        while beyond - within > 1:
            size = (within + beyond) // 2
            if request.tolerance.allows(self.evidence(size)):
                within = size
            else:
                beyond = size
        return within


def _reason(request: Request, full: Evidence, evidence: Evidence, n: int, within: int, asked: bool) -> str:
    n_candidates = request.model.n_candidates
    what = "as were asked for" if asked else "the most that lose no more than is tolerated"
    text = f"{n} of {n_candidates} layers, {what}, chosen by what is lost with them"
    if not n:
        return text
    if evidence.is_informed:
        loss = evidence.loss
        text += (
            f": on questions of other kinds {loss.value:.1%} (95 % interval {loss.low:.1%} to {loss.high:.1%}) of what the full model "
            f"finds, which is {full.known:.0%} of what is asked for"
        )
    else:
        text += f": the full model finds only {full.known:.1%} of what is asked for, too little to say what is lost of it"
    return f"{text}, and a KL divergence of {evidence.kl:.2g} nats"
