"""The report of a selection: which layers stream, why, and the lazy ratios that it follows from.

`report.json` says it exactly and can be read again (`lt-gguf flag --from`); `folder` writes it, with pictures and a section for
a model card beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lt_gguf.calibration import Calibration
from lt_gguf.report.fields import get, is_count, is_fraction, is_integer, is_integers, is_string, short
from lt_gguf.report.measured import (
    describe_caches,
    describe_candidate,
    describe_measurement,
    read_caches,
    read_candidates,
    read_measurement,
)
from lt_gguf.selection.base import Selection, fit_ratios, mean_over_samples
from lt_gguf.selection.caches import Caches
from lt_gguf.spec import Provenance, StreamingSpec

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Report:
    """What was measured and what was chosen.

    Args:
        model: name of the model or its file, without a folder.
        architecture: llama.cpp's name of it, or transformers' where no GGUF file has been made yet.
        spec: what streams.
        selection: how it was chosen; its layers, sink and window are those of `spec`.
        fraction: share of the layers that was to stream; `None` if something else decided their number.
        w_last: last tokens of each sample whose attention was measured; `None` if nothing was.
        ratios: lazy ratios (samples, layers), NaN where a layer wasn't measured; `None` if none were. Layers at the end
            may be left out.
        calibration: what they were measured on.
        caches: what was measured of types of the KV cache; `None` if nothing was.

    Raises:
        ValueError: the parts contradict each other; one line.
    """

    model: str
    architecture: str
    spec: StreamingSpec
    selection: Selection
    fraction: float | None = None
    w_last: int | None = None
    ratios: tuple[tuple[float, ...], ...] | None = None
    calibration: Calibration | None = None
    caches: Caches | None = None

    def __post_init__(self) -> None:
        spec, chosen = self.spec, self.selection
        if (chosen.layers, chosen.sink, chosen.window) != (spec.layers, spec.sink, spec.window):
            raise ValueError(f"report: the selection is not what streams ({spec})")
        object.__setattr__(self, "selection", replace(chosen, prefill=spec.prefill))
        if self.calibration is not None and (self.ratios is None or self.w_last is None):
            raise ValueError("report: has a calibration, must have lazy ratios and w_last too")
        if self.ratios is not None:
            n_measured = len(self.ratios[0]) if len(self.ratios) else 0
            ratios = fit_ratios(self.ratios, spec.n_layer, min(n_measured, spec.n_layer))
            object.__setattr__(self, "ratios", tuple(map(tuple, ratios.tolist())))

    @property
    def mean_ratios(self) -> tuple[float, ...] | None:
        """The mean over all samples, one number a layer; NaN where a layer wasn't measured."""
        if self.ratios is None:
            return None
        return tuple(mean_over_samples(np.array(self.ratios)).tolist())

    @property
    def provenance(self) -> Provenance:
        """What a GGUF file says of the selection."""
        calibration = None if self.calibration is None else json.dumps(self._described_calibration())
        return Provenance(self.selection.strategy, self.mean_ratios, calibration)

    def to_json(self) -> dict[str, Any]:
        """The content of `report.json`. NaN, which JSON doesn't have, is null."""
        mean, measured = self.mean_ratios, self.selection.measurement
        return {
            "version": FORMAT_VERSION,
            "model": self.model,
            "architecture": self.architecture,
            "n_layer": self.spec.n_layer,
            "strategy": self.selection.strategy,
            "reason": self.selection.reason,
            "warning": self.selection.warning,
            "fraction": self.fraction,
            "streaming_layers": list(self.spec.layers),
            "sink": self.spec.sink,
            "window": self.spec.window,
            "prefill": self.spec.prefill,
            "streaming": str(self.spec),
            "w_last": self.w_last,
            "lazy_ratio": None if mean is None else _without_nan(mean),
            "lazy_ratio_by_sample": None if self.ratios is None else list(map(_without_nan, self.ratios)),
            "calibration": None if self.calibration is None else self._described_calibration(),
            "candidates": [describe_candidate(candidate) for candidate in self.selection.candidates] or None,
            "measurement": None if measured is None else describe_measurement(measured),
            "cache_types": None if self.caches is None else describe_caches(self.caches),
        }

    @classmethod
    def from_json(cls, content: Any) -> Report:
        """The report that `to_json` described.

        Raises:
            ValueError: a key is missing or wrong; one line that names it.
        """
        if not isinstance(content, Mapping):
            raise ValueError("is no JSON object, must be a report of lt-gguf")
        if content.get("version") != FORMAT_VERSION:
            raise ValueError(f"version = {short(content.get('version'))}: must be {FORMAT_VERSION}, in a report of lt-gguf")
        layers = get(content, "streaming_layers", "a list of layers", is_integers)
        sink, window = (get(content, key, "an integer", is_integer) for key in ("sink", "window"))
        n_layer = get(content, "n_layer", "an integer", is_integer)
        prefill = get(content, "prefill", '"full" or "stream"', is_string)
        spec = StreamingSpec(tuple(layers), n_layer, sink, window, prefill)
        strategy, reason = (get(content, key, "a string", is_string) for key in ("strategy", "reason"))
        if content.get("streaming", str(spec)) != str(spec):
            raise ValueError(f'streaming = {short(content["streaming"])}: contradicts the other keys, which say "{spec}"')
        measured = read_candidates(content, n_layer), read_measurement(content)
        report = cls(
            get(content, "model", "a string", is_string),
            get(content, "architecture", "a string", is_string),
            spec,
            Selection(strategy, spec.layers, reason, sink, window, None, *measured, _read_warning(content)),
            get(content, "fraction", "a number from 0 to 1, or null", is_fraction),
            get(content, "w_last", "an integer of at least 1, or null", lambda value: value is None or is_count(value)),
            _read_ratios(content, n_layer),
            _read_calibration(content),
            read_caches(content, n_layer),
        )
        mean = report.mean_ratios
        if mean is not None and not _agree(content.get("lazy_ratio"), mean):
            raise ValueError("lazy_ratio: must be the mean of lazy_ratio_by_sample, one number a layer")
        return report

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report in a file.

        Raises:
            ValueError: it isn't one; one line that names the file and the key.
            OSError: the file can't be read.
        """
        try:
            return cls.from_json(json.loads(path.read_bytes()))
        except ValueError as error:
            what = "is no JSON" if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else str(error)
            raise ValueError(f"{path}: {what}") from None

    @property
    def conditions(self) -> str:
        """What the ratios were measured with, for a subtitle; what streams where nothing was measured."""
        text = f"sink {self.spec.sink}, window {self.spec.window}"
        if self.w_last is not None:
            text += f", last {self.w_last} tokens"
        if self.calibration is not None:
            n = self.calibration.samples
            text += f" of {'one sample' if n == 1 else f'each of {n} samples'} of {self.calibration.length} tokens"
        return text

    def _described_calibration(self) -> dict[str, Any]:
        assert self.calibration is not None and self.w_last is not None
        return self.calibration.describe(self.spec.sink, self.spec.window, self.w_last)


def _without_nan(ratios: tuple[float, ...]) -> list[float | None]:
    return [None if math.isnan(ratio) else ratio for ratio in ratios]


def _is_ratios(value: Any) -> bool:
    return isinstance(value, list) and all(ratio is None or is_fraction(ratio) for ratio in value)


def _read_ratios(content: Mapping[str, Any], n_layer: int) -> tuple[tuple[float, ...], ...] | None:
    def is_right(value: Any) -> bool:
        if value is None:
            return True
        return isinstance(value, list) and bool(value) and all(_is_ratios(row) and len(row) == n_layer for row in value)

    allowed = f"null, or for each sample a list of {n_layer} numbers from 0 to 1, null where a layer wasn't measured"
    rows = get(content, "lazy_ratio_by_sample", allowed, is_right)
    if rows is None:
        return None
    return tuple(tuple(math.nan if ratio is None else float(ratio) for ratio in row) for row in rows)


def _read_calibration(content: Mapping[str, Any]) -> Calibration | None:
    described = get(content, "calibration", "an object, or null", lambda value: value is None or isinstance(value, dict))
    if described is None:
        return None
    data, sha256 = (get(described, key, "a string", is_string) for key in ("data", "sha256"))
    samples, length = (get(described, key, "an integer of at least 1", is_count) for key in ("samples", "length"))
    return Calibration(data, sha256, samples, length)


def _read_warning(content: Mapping[str, Any]) -> str | None:
    warning = content.get("warning")  # note: older reports have no such key
    if warning is not None and not is_string(warning):
        raise ValueError(f"warning = {short(warning)}: must be a string, or null")
    return warning


def _agree(stored: Any, mean: tuple[float, ...]) -> bool:
    if not _is_ratios(stored) or len(stored) != len(mean):
        return False
    return all(
        math.isnan(right) if ratio is None else math.isclose(ratio, right, abs_tol=1e-6)
        for ratio, right in zip(stored, mean, strict=True)
    )
