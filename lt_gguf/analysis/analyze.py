"""Lets a strategy choose the layers of a model, by what it needs to measure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lt_gguf import calibration
from lt_gguf.analysis.subjects import Subject
from lt_gguf.calibration import DEFAULT_FIELD, DEFAULT_LENGTH, DEFAULT_SAMPLES, Calibration
from lt_gguf.evaluation.candidates import DEFAULT_QUESTIONS
from lt_gguf.report.report import Report
from lt_gguf.selection import DEFAULT_STRATEGY, Request, Strategy
from lt_gguf.selection.caches import Caches, check_cache_types, measure_caches
from lt_gguf.spec import DEFAULT_PREFILL, DEFAULT_W_LAST, StreamingSpec
from lt_gguf.spec.cache_types import CacheTypes


class Progress(Protocol):
    """Is told how far the measuring is."""

    def __call__(self, what: str, done: int, total: int) -> None: ...

    def announce(self, line: str) -> None:
        """Is told what is about to be run, in a line that is to stay."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Args:
        calibration: text or JSONL file to measure on; `None`: texts that come with the package.
        calibration_field: of each line of a JSONL file.
        samples: prompts that are cut out of the texts.
        questions: conversations about long texts to choose by, and others to judge by, where the hybrid itself is run.
        length: tokens of each prompt; `None`: 4096 or what the model was trained for, if that is less.
        w_last: last tokens of each sample whose attention is measured.
        prefill: how a prompt is to be read, `full` or `stream`.
        all_ratios: also lazy ratios that the strategy doesn't need.
        cache_types: of the KV cache, measured with the layers that `loss` chose, and without.
    """

    calibration: Path | None = None
    calibration_field: str = DEFAULT_FIELD
    samples: int = DEFAULT_SAMPLES
    questions: int = DEFAULT_QUESTIONS
    length: int | None = None
    w_last: int = DEFAULT_W_LAST
    prefill: str = DEFAULT_PREFILL
    all_ratios: bool = True
    cache_types: tuple[CacheTypes, ...] = ()


def analyze(subject: Subject, chosen: Strategy, request: Request, how: Settings, progress: Progress) -> Report:
    """What a strategy chooses, and what was measured for it.

    Args:
        request: what the strategy is to choose from, for this subject's model; ratios and candidates are added here.

    Raises:
        ValueError: the texts or the request are wrong, or the strategy needs what this subject can't give.
        OSError: a file can't be read.
    """
    selection = None if chosen.measures else chosen.select(request)
    seen = selection or request  # note: a preset has its own, and its ratios must be those of what will stream
    measured: dict[str, Any] = {}
    caches: Caches | None = None
    if how.cache_types:
        if not chosen.takes_tolerance:
            raise ValueError(f"selection {chosen.name}: measures no cache types, only {DEFAULT_STRATEGY} does")
        check_cache_types(how.cache_types, subject.kv_shape())
    if chosen.measures or how.all_ratios:
        length = how.length if how.length is not None else min(DEFAULT_LENGTH, subject.n_ctx)
        calibration.check_length(length, seen.sink, max(seen.window, *request.windows, 0))
        texts = calibration.read_texts(how.calibration, how.calibration_field)

        def show_progress(what: str, done: int, total: int) -> None:
            progress(f"Measuring, {what}", done, total)

        def announce(what: str, done: int, total: int) -> None:
            """What will be run is said before it is."""
            if done == 0:
                progress.announce(what)
            show_progress(what, done, total)

        if chosen.needs_ratios or how.all_ratios:
            windows = {"sink": seen.sink, "window": seen.window, "w_last": how.w_last}
            ratios = subject.measure(texts, how.samples, length, **windows, progress=show_progress)
            request = replace(request, ratios=ratios)
            described = Calibration(texts.name, texts.sha256, how.samples, length)
            measured = {"w_last": how.w_last, "ratios": ratios, "calibration": described}
        if chosen.measures_hybrid:
            spec = StreamingSpec((), subject.model.n_layer, seen.sink, seen.window, how.prefill)
            settings = {"questions": how.questions, "length": length, "windows": request.windows}
            with subject.candidates(texts, spec, **settings, progress=announce) as candidates:
                try:
                    selection = chosen.select(replace(request, candidates=candidates))
                    if how.cache_types:
                        judge = candidates.with_window(selection.window)
                        shape, tolerance = subject.kv_shape(), request.tolerance
                        caches = measure_caches(how.cache_types, selection, subject.model.n_layer, shape, judge, tolerance)
                except KeyboardInterrupt:
                    progress.announce("interrupted: what was measured is kept, the same command goes on")
                    raise
    selection = selection or chosen.select(request)
    spec = selection.spec(subject.model.n_layer, how.prefill)
    if chosen.takes_tolerance and request.asked_count(subject.model.n_candidates) is None:
        subject.remember(spec)
    return Report(
        subject.name, subject.model.architecture, spec, selection, chosen.share(request.fraction), **measured, caches=caches
    )
