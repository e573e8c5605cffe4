"""Finds the lazy layers of a GGUF model on a text, with the runtime and without the original checkpoint.

A layer's lazy ratio is the share of its attention that goes to the sinks and the window (LightTransfer, arXiv 2410.13846,
section 3); the layers with the highest ones are the lazy ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lt_gguf.spec import AutoSpec, StreamingSpec

if TYPE_CHECKING:
    from lt_gguf.runtime.llama import Llama

STRATEGY = "lazy-ratio"


@dataclass(frozen=True)
class Calibration:
    """The text that lazy ratios were measured on.

    Args:
        data: name of the text.
        sha256: of its bytes.
        samples: number of prompts that were cut out of it.
        length: tokens of each.
    """

    data: str
    sha256: str
    samples: int
    length: int

    def describe(self, measured: AutoSpec) -> dict[str, Any]:
        """As in a GGUF file's `lighttransfer.calibration`."""
        return {
            "data": self.data,
            "sha256": self.sha256,
            "samples": self.samples,
            "length": self.length,
            "tokens": self.samples * self.length,
            "w_last": measured.w_last,
            "w_sink": measured.sink,
            "w_recent": measured.window,
        }


@dataclass(frozen=True)
class LazyLayers:
    """What was measured, and the layers that follow from it.

    Args:
        ratios: one number in [0, 1] a layer, the mean over all samples; NaN where a layer has no KV cache of its own.
        measured: sink, window, w_last and the share of the layers that are to stream.
        calibration: what it was measured on.
    """

    ratios: tuple[float, ...]
    measured: AutoSpec
    calibration: Calibration

    @property
    def layers(self) -> tuple[int, ...]:
        return laziest(self.ratios, self.measured.fraction)

    @property
    def spec(self) -> StreamingSpec:
        return StreamingSpec(self.layers, len(self.ratios), self.measured.sink, self.measured.window, prefill="full")

    def describe(self) -> dict[str, Any]:
        """What `lt-gguf analyze --out` writes."""
        return {
            "strategy": STRATEGY,
            "n_layer": len(self.ratios),
            "fraction": self.measured.fraction,
            "streaming_layers": list(self.layers),
            "sink": self.measured.sink,
            "window": self.measured.window,
            "w_last": self.measured.w_last,
            "lazy_ratio": [None if math.isnan(ratio) else round(ratio, 6) for ratio in self.ratios],
            "streaming": str(self.spec),
            "calibration": self.calibration.describe(self.measured),
        }


def laziest(ratios: Sequence[float], fraction: float) -> tuple[int, ...]:
    """The share `fraction` of the measured layers, rounded down, that has the highest ratios, ascending. Of two layers with
    the same ratio the one with the lower number stays full."""
    order = sorted((il for il, ratio in enumerate(ratios) if not math.isnan(ratio)), key=lambda il: (ratios[il], il))
    n = math.floor(len(order) * Fraction(fraction).limit_denominator(10_000))
    return tuple(sorted(order[len(order) - n :]))


class Samples:
    """Prompts of equal length, spread evenly over a text.

    Args:
        llm: has the tokenizer.
        path: the text, UTF-8.
        samples: number of prompts.
        length: tokens of each, a BOS token included where the model wants one.

    Raises:
        ValueError: the text isn't UTF-8 or too short, or a number is out of range.
        OSError: it can't be read.
    """

    def __init__(self, llm: Llama, path: Path, samples: int, length: int) -> None:
        if samples < 1:
            raise ValueError(f"samples = {samples}: must be at least 1")
        data = path.read_bytes()
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8, see byte {error.start}") from None
        self.calibration = Calibration(path.name, hashlib.sha256(data).hexdigest(), samples, length)
        tokens = llm.tokenize(data, add_bos=False)
        with_bos = llm.tokenize(b"", add_bos=True)
        part = length - len(with_bos)
        if len(tokens) < samples * part:
            raise ValueError(
                f"{path}: has {len(tokens)} tokens, must have {samples * part} for {samples} samples of {length}: "
                "give a longer text, fewer samples or a shorter length"
            )
        stride = len(tokens) // samples
        self.prompts = [with_bos + tokens[i * stride : i * stride + part] for i in range(samples)]


def measure(llm: Llama, samples: Samples, measured: AutoSpec) -> Iterator[Sequence[float]]:
    """The lazy ratios of one sample after the other, float32 (n_layer,) each. Raises as `Llama.lazy_ratios` does."""
    for prompt in samples.prompts:
        yield llm.lazy_ratios(prompt, measured.sink, measured.window, measured.w_last)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file as a whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
