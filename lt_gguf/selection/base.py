"""What every strategy of selection takes and gives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from lt_gguf.selection.evidence import Candidate, Candidates, Measurement
from lt_gguf.selection.tolerance import DEFAULT_MAX_KL, DEFAULT_MAX_LOSS, Tolerance
from lt_gguf.spec import DEFAULT_FRACTION, DEFAULT_PREFILL, DEFAULT_SINK, DEFAULT_WINDOW, StreamingSpec

SEARCHED_WINDOWS = (252, 508, 1020, 2044)  # with 4 sinks, cells in multiples of 256
SEARCH_HELP = (
    "the one with which the cache is smallest, or, where a number of layers is asked for, that loses least at equal memory"
)
LONGEST_COMPARED = 32_768  # tokens at which the memory of two windows is compared, where the model's context is longer


@dataclass(frozen=True)
class Model:
    """What is known of a model when its layers are chosen.

    Args:
        architecture: llama.cpp's name of it, or transformers' where no GGUF file has been made yet.
        name: for messages, and for what is recognised by it.
        n_layer: number of layers, those included that only predict ahead.
        n_layer_main: of them, the first ones, which the main graph runs.
        config: the checkpoint's config.json, empty if unknown.
        may_stream: the layers that may stream, those of the main graph with full attention: a strategy chooses among them, and a share
            is of them. If not given, all that the main graph runs.
    """

    architecture: str
    name: str
    n_layer: int
    n_layer_main: int
    config: Mapping[str, Any] = field(default_factory=dict)
    may_stream: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.may_stream:
            object.__setattr__(self, "may_stream", tuple(range(self.n_layer_main)))

    @property
    def n_candidates(self) -> int:
        """How many layers may stream."""
        return len(self.may_stream)


@dataclass(frozen=True, eq=False)
class Request:
    """What a strategy is to choose from.

    Args:
        model: whose layers.
        n_streaming: how many layers must stream so that a KV budget is kept; `None`: the share `fraction`.
        fraction: share of the layers that is to stream, rounded down; `None`: the strategy's own number, or `DEFAULT_FRACTION`.
        ratios: lazy ratios, float64 (samples, layers), NaN where none was measured; `None` if none were. Layers at the end
            that only predict ahead may be left out, and those of layers that can't stream don't count.
        layers: the layers that the user names, for `manual`.
        threshold: smallest lazy ratio of a streaming layer, for `threshold`; its own default if not given.
        sink: number of first positions that a streaming layer sees.
        window: number of last positions that it sees.
        candidates: what measures sets of layers on the hybrid itself, with this sink and window; `None` if it can't be run.
        max_loss: what may be lost of what the full model finds, from 0 to 1, for `loss`.
        max_kl: largest KL divergence from the full model, in nats, for `loss`.
        windows: that `loss` chooses among, besides `window`.
        n_ctx: tokens at which the memory that these take is compared.

    Raises:
        ValueError: a number is out of range, or the ratios aren't those of this model.
    """

    model: Model
    n_streaming: int | None = None
    fraction: float | None = None
    ratios: np.ndarray | None = None
    layers: str | None = None
    threshold: float | None = None
    sink: int = DEFAULT_SINK
    window: int = DEFAULT_WINDOW
    candidates: Candidates | None = None
    max_loss: float = DEFAULT_MAX_LOSS
    max_kl: float = DEFAULT_MAX_KL
    windows: tuple[int, ...] = ()
    n_ctx: int = LONGEST_COMPARED

    def __post_init__(self) -> None:
        n_layer, n_candidates = self.model.n_layer, self.model.n_candidates
        StreamingSpec.interleaved(n_layer, self.share, self.sink, self.window)  # checks these
        self.tolerance  # noqa: B018 - checks these
        for window in self.windows:
            StreamingSpec.interleaved(n_layer, self.share, self.sink, window)
        if self.n_streaming is not None and not 0 <= self.n_streaming <= n_candidates:
            raise ValueError(f"streaming layers = {self.n_streaming}: must be from 0 to {n_candidates}, the layers that can stream")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold = {self.threshold}: must be a lazy ratio, a number from 0 to 1")
        if self.ratios is not None:
            ratios = fit_ratios(self.ratios, n_layer, self.model.n_layer_main)
            others = [il for il in range(n_layer) if il not in self.model.may_stream]
            ratios[:, others] = math.nan
            object.__setattr__(self, "ratios", ratios)

    @property
    def share(self) -> float:
        """The share of the layers, for strategies that have no number of their own."""
        return DEFAULT_FRACTION if self.fraction is None else self.fraction

    @property
    def tolerance(self) -> Tolerance:
        """What may be lost."""
        return Tolerance(self.max_loss, self.max_kl)

    @property
    def mean_ratios(self) -> np.ndarray:
        """The mean over all samples, float64 (n_layer,), NaN where a layer wasn't measured."""
        assert self.ratios is not None
        return mean_over_samples(self.ratios)

    @property
    def measured_layers(self) -> list[int]:
        """The main layers that have a ratio: those among which a strategy chooses by ratios."""
        mean = self.mean_ratios[: self.model.n_layer_main]
        return [il for il, ratio in enumerate(mean) if not math.isnan(ratio)]

    def count(self, n_candidates: int) -> int:
        """How many of `n_candidates` layers are to stream: what the budget needs, else floor(fraction * n_candidates).

        Raises:
            ValueError: the budget needs more layers than there are candidates.
        """
        if self.n_streaming is None:
            return len(StreamingSpec.interleaved(n_candidates, self.share).layers) if n_candidates else 0
        if self.n_streaming > n_candidates:
            raise ValueError(
                f"the KV budget needs {self.n_streaming} streaming layers, only {n_candidates} can be chosen: "
                "must be a larger budget or a smaller context"
            )
        return self.n_streaming

    def asked_count(self, n_candidates: int) -> int | None:
        """The same; `None` if nobody has asked for a number. Raises ValueError as `count`."""
        return None if self.n_streaming is None and self.fraction is None else self.count(n_candidates)


@dataclass(frozen=True)
class Selection:
    """What a strategy chose.

    Args:
        strategy: its name, as `lighttransfer.selection` says it.
        layers: the layers that are to stream, ascending.
        reason: one sentence for the report.
        sink: number of first positions that they see; a preset has its own.
        window: number of last positions that they see; a preset has its own.
        prefill: `full` or `stream` where the strategy knows it (a checkpoint that was trained to stream), else `None`:
            what the user says.
        candidates: what was measured on the hybrid itself, if anything was; the full model is the first.
        measurement: what it was measured on.
        warning: what is lost with it, if that is more than is tolerated; one line.
    """

    strategy: str
    layers: tuple[int, ...]
    reason: str
    sink: int
    window: int
    prefill: str | None = None
    candidates: tuple[Candidate, ...] = ()
    measurement: Measurement | None = None
    warning: str | None = None

    def spec(self, n_layer: int, prefill: str = DEFAULT_PREFILL) -> StreamingSpec:
        """The spec of a model of `n_layer` layers. Raises ValueError as `StreamingSpec` does."""
        return StreamingSpec(self.layers, n_layer, self.sink, self.window, self.prefill or prefill)


class Strategy(ABC):
    """Chooses the layers that are to stream.

    A subclass says its `name` and implements `choose`; `select` makes sure that what it is given and what it gives back
    makes sense, the same for all.
    """

    name: str
    needs_ratios: ClassVar[bool] = False
    measures_hybrid: ClassVar[bool] = False  # runs candidates on the model, which must be a GGUF file
    takes_layers: ClassVar[bool] = False
    takes_threshold: ClassVar[bool] = False
    takes_tolerance: ClassVar[bool] = False  # decides by it how many layers stream, unless a number is asked for
    counts: ClassVar[bool] = True  # makes as many layers stream as it is asked to
    instead: ClassVar[str] = "a larger budget or a smaller context"  # what would be right where it breaks the budget

    @property
    def measures(self) -> bool:
        """Whether anything has to be measured before it chooses."""
        return self.needs_ratios or self.measures_hybrid

    def select(self, request: Request) -> Selection:
        """Chooses the layers.

        Raises:
            ValueError: the request lacks what this strategy needs, or has what it doesn't take, or the layers don't keep
                the budget; one line.
        """
        self.check_options(request.layers, request.threshold)
        if self.needs_ratios and request.ratios is None:
            raise ValueError(f"selection {self.name}: needs lazy ratios, and none were measured")
        if self.measures_hybrid:
            if request.candidates is None:
                raise ValueError(f"selection {self.name}: runs the hybrid itself, must be asked of a GGUF file")
            request.candidates.announce(*self.runs(request))
        selection = self.choose(request)
        if request.n_streaming is not None and len(selection.layers) < request.n_streaming:
            raise ValueError(
                f"selection {self.name}: makes {len(selection.layers)} layers stream, the KV budget needs "
                f"{request.n_streaming}: must be {self.instead}"
            )
        return self._with_warning(request, selection)

    @staticmethod
    def _with_warning(request: Request, selection: Selection) -> Selection:
        """A strategy that has measured its layers doesn't make them stream silently if they lose more than is tolerated."""
        evidence = next((each.evidence for each in reversed(selection.candidates) if each.layers == selection.layers), None)
        if selection.warning is not None or evidence is None or not selection.layers:
            return selection
        return replace(selection, warning=request.tolerance.warning(evidence, len(selection.layers)))

    def check_options(self, layers: str | None, threshold: float | None) -> None:
        """Raises ValueError if this strategy is given what another takes, or not what it takes; before anything is measured."""
        if layers is not None and not self.takes_layers:
            raise ValueError(f"selection {self.name}: chooses the layers itself, must not be given --streaming-layers")
        if layers is None and self.takes_layers:
            raise ValueError(f"selection {self.name}: needs --streaming-layers, as in 1,3,5-9, all or none")
        if threshold is not None and not self.takes_threshold:
            raise ValueError(f"selection {self.name}: takes no --threshold, only threshold does")

    def share(self, fraction: float | None) -> float | None:
        """The share of the layers that `fraction` asks for; `None` where this strategy has a number of its own."""
        if not self.counts or (self.takes_tolerance and fraction is None):
            return None
        return DEFAULT_FRACTION if fraction is None else fraction

    def runs(self, request: Request) -> tuple[int, int]:
        """About how many sets of layers are measured, the full model included: to choose by, and to judge by."""
        return 0, 0

    @abstractmethod
    def choose(self, request: Request) -> Selection:
        """The layers, of a request that has what this strategy needs."""

    def selection(self, request: Request, layers: list[int] | tuple[int, ...], reason: str) -> Selection:
        """A selection with the request's own sink and window."""
        return Selection(self.name, tuple(sorted(layers)), reason, request.sink, request.window)


def parse_share(what: str, text: str | float) -> float:
    """Reads `1%` or `0.01`. Raises ValueError, which names it as `what`: it is neither."""
    said = str(text).strip()
    try:
        return float(said.removesuffix("%")) / (100 if said.endswith("%") else 1)
    except ValueError:
        raise ValueError(f'{what} = "{text}": must be a share, as in 1% or 0.01') from None


def fit_ratios(ratios: Any, n_layer: int, n_layer_main: int | None = None) -> np.ndarray:
    """Lazy ratios with a column for each layer: float64 (samples, n_layer). Columns that are added hold NaN.

    Raises:
        ValueError: the shape isn't (samples, layers), a ratio isn't in [0, 1], or a layer was measured in some samples only.
    """
    n_layer_main = n_layer if n_layer_main is None else n_layer_main
    ratios = np.array(ratios, dtype=np.float64)  # a copy: nobody else changes it
    if ratios.ndim != 2 or len(ratios) < 1:
        raise ValueError(f"lazy ratios: are an array of shape {ratios.shape}, must be (samples, layers)")
    if not n_layer_main <= ratios.shape[1] <= n_layer:
        raise ValueError(f"lazy ratios: are of {ratios.shape[1]} layers, the model has {n_layer}")
    if bad := next((float(ratio) for ratio in ratios.flat if not (math.isnan(ratio) or -1e-6 <= ratio <= 1 + 1e-6)), None):
        raise ValueError(f"lazy ratios: {bad} is among them, must be numbers from 0 to 1")
    unmeasured = np.isnan(ratios)
    if partly := np.flatnonzero(unmeasured.any(axis=0) & ~unmeasured.all(axis=0)).tolist():
        n_samples = int((~unmeasured[:, partly[0]]).sum())
        raise ValueError(f"lazy ratios: layer {partly[0]} was measured in {n_samples} of {len(ratios)} samples, must be in all")
    # note: measured in float32 by the runtime, so a ratio may be a little more than 1
    ratios = np.clip(ratios, 0, 1)
    padding = np.full((len(ratios), n_layer - ratios.shape[1]), math.nan)
    return np.hstack([ratios, padding])


def mean_over_samples(ratios: np.ndarray) -> np.ndarray:
    """The mean of lazy ratios (samples, layers), float64 (layers,), NaN where a layer wasn't measured.

    Exact sums, so that the order of the samples never decides a tie.
    """
    return np.array([math.fsum(of_layer) / len(of_layer) for of_layer in ratios.T.tolist()])
