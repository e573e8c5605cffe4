"""Which layers are to stream in training: those that are lazy in most training samples (arXiv 2410.13846, section 4), or those with
which the model loses least before it is trained."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lt_gguf.checkpoint import checks
from lt_gguf.checkpoint.folder import read_config
from lt_gguf.hf import analysis
from lt_gguf.selection import Model, Request, strategy
from lt_gguf.selection.base import mean_over_samples
from lt_gguf.spec import Provenance, StreamingSpec
from lt_gguf.spec.in_config import KEY, read_spec
from lt_gguf.training.data import Samples, shuffled_split
from lt_gguf.training.settings import DEFAULT_STRATEGY


@dataclass(frozen=True)
class Chosen:
    """What streams, how that was chosen, and one sentence that says why."""

    spec: StreamingSpec
    provenance: Provenance
    reason: str


def choose_layers(
    checkpoint: Path,
    samples: Samples,
    *,
    select: str | None,
    fraction: float,
    layers: str | None,
    sink: int,
    window: int,
    n_samples: int,
    n_questions: int,
    w_last: int,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> Chosen:
    """Which layers are to stream in training.

    Args:
        checkpoint: the model's folder.
        samples: what it is trained on, question and answer together, as it will be read.
        select: one of `settings.STRATEGIES`; by default the layers that are named, those that the model was trained with before, or
            else the most frequent ones.
        fraction: share of the layers that is to stream, where the strategy doesn't know their number.
        layers: for `manual`, as in 1,3,5-9.
        n_samples: lazy ratios are measured on so many samples at most; those count that are longer than sink + window.
        n_questions: conversations that `loss` chooses by.
        w_last: last tokens of each whose attention is measured.
        progress: is told what is being measured, how much of it is done, of how much.

    Raises:
        ValueError: a wrong argument, or no sample is long enough.
        OSError: a file can't be read or written.
    """
    content = read_config(checkpoint.name, checkpoint)
    if select is None:
        select = "manual" if layers is not None else "trained" if KEY in content else DEFAULT_STRATEGY
    chosen = strategy(select)
    chosen.check_options(layers, None)
    if chosen.measures_hybrid:
        return _by_running(checkpoint, select, fraction, sink, window, n_questions, progress)
    config = checks.read_config(checkpoint)
    n_layer = config.get_text_config(decoder=True).num_hidden_layers
    ratios, calibration = None, None
    if chosen.needs_ratios:
        measured = _long_samples(samples, sink + window, n_samples, seed)
        ratios = analysis.measure(checkpoint, measured, sink=sink, window=window, w_last=w_last, progress=progress)
        calibration = _describe(samples, measured, sink, window, w_last)
    model = Model(config.model_type, checkpoint.resolve().name, n_layer, n_layer, content, checks.full_layers(config))
    selection = chosen.select(Request(model, fraction=fraction, ratios=ratios, layers=layers, sink=sink, window=window))
    spec = StreamingSpec(selection.layers, n_layer, selection.sink, selection.window, "stream")
    if not spec.layers:
        raise ValueError(f"selection {selection.strategy}: no layer is to stream, must be one or more to train for")
    before = read_spec(content, n_layer) if select == "trained" else None
    mean = None if ratios is None else tuple(mean_over_samples(ratios).tolist())
    return Chosen(spec, before[1] if before else Provenance(selection.strategy, mean, calibration), selection.reason)


def _by_running(
    checkpoint: Path,
    select: str,
    fraction: float,
    sink: int,
    window: int,
    n_questions: int,
    progress: Callable[[str, int, int], None],
) -> Chosen:
    """What is chosen by running the checkpoint as a hybrid file, which is removed again.

    Prompts are read with full attention there, though training streams while it reads: with that each set of layers would have to
    read the texts for itself, and the untrained model would lose with any.
    """
    from lt_gguf.conversion import convert  # without it training needs no converter

    asked = {"fraction": fraction, "sink": sink, "window": window, "questions": n_questions}
    with tempfile.TemporaryDirectory(prefix="lt-gguf-train-") as folder:
        converted = convert(checkpoint, Path(folder) / "checkpoint.gguf", select=select, no_report=True, progress=progress, **asked)
    assert converted.spec is not None and converted.selection is not None  # it was no dry run
    spec = replace(converted.spec, prefill="stream")
    if not spec.layers:
        raise ValueError(f"selection {select}: no layer is to stream, must be one or more to train for")
    return Chosen(spec, Provenance(select), converted.selection.reason)


def _long_samples(samples: Samples, least: int, n_samples: int, seed: int) -> list[Sequence[int]]:
    """At most `n_samples` of those that have something beyond sink and window: of the others every layer's ratio is 1."""
    tokens = [example["input_ids"] for example in samples.training]
    long = [sample for sample in tokens if len(sample) > least]
    if not long:
        raise ValueError(
            f"{samples.name}: no sample is longer than sink + window = {least} tokens, the longest has {max(map(len, tokens))}: "
            "must have longer ones, a smaller --window, or --streaming-layers"
        )
    _, picked = shuffled_split(len(long), min(n_samples, len(long)), seed)
    return [long[i] for i in sorted(picked)]


def _describe(samples: Samples, measured: Sequence[Sequence[int]], sink: int, window: int, w_last: int) -> str:
    """As `calibration.Calibration.describe`; samples aren't of one length here, `length` is that of the longest."""
    content: dict[str, Any] = {
        "data": samples.name,
        "sha256": samples.sha256[0],
        "samples": len(measured),
        "length": max(map(len, measured)),
        "tokens": sum(map(len, measured)),
        "w_last": w_last,
        "w_sink": sink,
        "w_recent": window,
    }
    return json.dumps(content)
