"""`kl` and `kl-greedy`: the layers that change the model least when they stream, measured on the hybrid itself.

A lazy ratio says where a layer looks, not what the model loses (arXiv 2512.10411, appendix F: it picks the best layers in one
family and bad ones in another). Here candidates are run, and the measure is the KL divergence of their predictions from the
full model's, on calibration texts and on answers that stand far back in the prompt.
"""

from __future__ import annotations

from dataclasses import replace

from lt_gguf.selection.base import Request, Selection, Strategy
from lt_gguf.selection.evidence import Candidate


class Kl(Strategy):
    """The layers with the smallest divergence when each streams alone: n_layer + 1 runs, the full model's included.

    That two layers do each other's work, so that only both together are missed, is not seen; `kl-greedy` sees it.
    """

    name = "kl"
    measures_hybrid = True

    def runs(self, request: Request) -> tuple[int, int]:
        return 1 + request.model.n_candidates, 0

    def choose(self, request: Request) -> Selection:
        assert request.candidates is not None
        may_stream, n_candidates = request.model.may_stream, request.model.n_candidates
        bench = request.candidates.choosing
        full = Candidate("full", (), bench.measure(()))
        measured = bench.measure_all([(il,) for il in may_stream])
        alone = [Candidate(f"layer {il}", (il,), evidence) for il, evidence in zip(may_stream, measured)]
        kl = {candidate.layers[0]: candidate.evidence.kl for candidate in alone}
        # note: as elsewhere, of equal layers those with the lower numbers stay full
        order = sorted(may_stream, key=lambda il: (kl[il], -il))
        n_streaming = request.count(n_candidates)
        layers, others = order[:n_streaming], order[n_streaming:]
        reason = f"none of {n_candidates} layers is to stream"
        if layers:
            reason = (
                f"{len(layers)} of {n_candidates} layers change the model least when they stream alone, by a KL divergence of "
                f"{kl[layers[-1]]:.2g} nats or less"
            )
            if others:
                reason += f", where the full layers have {kl[others[0]]:.2g} or more"
        found = self.selection(request, layers, reason)
        return replace(found, candidates=(full, *alone), measurement=request.candidates.measurement)


class KlGreedy(Strategy):
    """One layer after the other, each time the one with which the divergence of all chosen ones together is smallest.

    For k of n layers that takes 1 + n + (n - 1) + ... + (n - k + 1) runs, the full model's included.
    """

    name = "kl-greedy"
    measures_hybrid = True

    def runs(self, request: Request) -> tuple[int, int]:
        n = request.model.n_candidates
        return 1 + sum(n - i for i in range(request.count(n))), 0

    def choose(self, request: Request) -> Selection:
        assert request.candidates is not None
        may_stream, n_candidates = request.model.may_stream, request.model.n_candidates
        bench = request.candidates.choosing
        steps = [Candidate("full", (), bench.measure(()))]
        for _ in range(request.count(n_candidates)):
            chosen = steps[-1].layers
            # note: of equal layers the one with the highest number comes first, and streams
            left = [il for il in reversed(may_stream) if il not in chosen]
            grown = [(il, tuple(sorted((*chosen, il)))) for il in left]
            measured = bench.measure_all([layers for _, layers in grown])
            tried = [Candidate(f"with layer {il}", layers, evidence) for (il, layers), evidence in zip(grown, measured)]
            steps.append(min(tried, key=lambda candidate: candidate.evidence.kl))
        last = steps[-1]
        reason = (
            f"{len(last.layers)} of {n_candidates} layers, added one by one, change the model by a KL divergence of "
            f"{last.evidence.kl:.2g} nats"
        )
        found = self.selection(request, last.layers, reason)
        return replace(found, candidates=tuple(steps), measurement=request.candidates.measurement)
