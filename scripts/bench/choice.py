"""Measures what choosing layers by loss costs, beside reading the prompts that it asks about once.

    python scripts/bench/choice.py [smollm2] [--questions 4] [--threads N] [--search-window]

Several of the conversations that the layers are chosen and judged by share a document. So there are two things to compare
with, both taken from the same run: reading each document once, and reading each conversation's prompt for itself, once, as somebody
would who asked them of one model. Nothing that was measured before is used.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from lt_gguf import calibration
from lt_gguf.evaluation.candidates import open_candidates
from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.runtime_bench import RuntimeBench
from lt_gguf.gguf.file import read_model
from lt_gguf.models import resolve
from lt_gguf.models.package import CACHE_VARIABLE
from lt_gguf.runtime.log import captured_errors
from lt_gguf.selection import Model, Request, strategy
from lt_gguf.selection.base import LONGEST_COMPARED, SEARCHED_WINDOWS
from lt_gguf.spec import StreamingSpec


def timed_reading(bench: RuntimeBench) -> float:
    """Seconds in which the documents of a bench are read: those of measuring the full model, less those of another set."""
    seconds = []
    for layers in ((), (0,)):
        begin = time.perf_counter()
        bench.measure(layers)
        seconds.append(time.perf_counter() - begin)
    return seconds[0] - seconds[1]


def main(
    model: Annotated[str, typer.Argument(help="GGUF file, or a name")] = "smollm2",
    questions: Annotated[int, typer.Option(min=1, help="as of lt-gguf analyze")] = 4,
    length: Annotated[int, typer.Option(min=600)] = calibration.DEFAULT_LENGTH,
    threads: Annotated[int, typer.Option(min=0, help="0: the physical cores")] = 0,
    search_window: Annotated[bool, typer.Option("--search-window")] = False,
) -> None:
    """Times of a choice by loss."""
    file = Path(resolve(model))
    described = read_model(file)
    texts, options = calibration.read_texts(None), ScorerOptions(n_threads=threads or None)
    windows = SEARCHED_WINDOWS if search_window else ()
    with tempfile.TemporaryDirectory() as cache:
        os.environ[CACHE_VARIABLE] = cache
        spec = StreamingSpec((), described.n_layer)
        settings = {"questions": questions, "length": min(length, described.n_ctx_train), "windows": windows, "options": options}
        with captured_errors(forward=False), open_candidates(file, spec, texts, **settings) as candidates:
            reading = sum(timed_reading(bench) for bench in (candidates.choosing, candidates.judging))
            begin = time.perf_counter()
            n_ctx = min(described.n_ctx_train, LONGEST_COMPARED)
            asked = Model(described.architecture, described.name, described.n_layer, described.n_layer_main)
            chosen = strategy("loss").select(Request(asked, candidates=candidates, windows=windows, n_ctx=n_ctx))
            sets = time.perf_counter() - begin
            measured = candidates.measurement
            benches = candidates.choosing, candidates.judging
            each = sum(bench.tokens_of_prompts for bench in benches) / sum(bench.tokens_to_read for bench in benches)
    total = reading + sets
    print(f"{file.name}: {measured}")
    print(f"chosen: {chosen.reason}")
    print(
        f"reading the documents once: {reading:.0f} s; {measured.sets} sets of layers: {sets:.0f} s, {sets / measured.sets:.1f} s each"
    )
    print(f"the whole choice: {total:.0f} s, {total / reading:.2f} of reading the documents once")
    print(f"                  {total / (each * reading):.2f} of reading the prompt of each conversation once")
    print(f"as many sets, each reading the documents for itself: {measured.sets * reading / total:.1f} times as long, at least")


if __name__ == "__main__":
    typer.run(main)
