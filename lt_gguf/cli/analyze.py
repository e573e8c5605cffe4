"""`lt-gguf analyze`: which layers of a GGUF model are lazy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from lt_gguf.cli import model
from lt_gguf.gguf_file import check_can_stream, read_model
from lt_gguf.kv_memory import DEFAULT_CACHE_TYPE
from lt_gguf.lazy_layers import LazyLayers, Samples, measure, write_json
from lt_gguf.spec import DEFAULT_FRACTION, DEFAULT_SINK, DEFAULT_W_LAST, DEFAULT_WINDOW, AutoSpec, StreamingSpec

DEFAULT_SAMPLES = 8
DEFAULT_LENGTH = 4096
BAR_WIDTH = 40


def analyze(
    file: model.ModelFile,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to measure on, long enough for all samples; like what the model will read.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Prompts that are cut out of the text.")] = DEFAULT_SAMPLES,
    length: Annotated[
        int | None,
        typer.Option(help=f"Tokens of each; {DEFAULT_LENGTH} by default, or the model's context if that is smaller."),
    ] = None,
    sink: Annotated[int, typer.Option(help="First positions that a streaming layer always sees.")] = DEFAULT_SINK,
    window: Annotated[int, typer.Option(help="Last positions that a streaming layer sees.")] = DEFAULT_WINDOW,
    w_last: Annotated[int, typer.Option(help="Last tokens of each sample whose attention is measured.")] = DEFAULT_W_LAST,
    fraction: Annotated[float, typer.Option(help="Share of the layers that is to stream.")] = DEFAULT_FRACTION,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    cache_type: model.CacheType = DEFAULT_CACHE_TYPE,
    threads: model.Threads = 0,
    n_gpu_layers: model.GpuLayers = -1,
    batch_size: model.BatchSize = model.DEFAULT_BATCH_SIZE,
    flash_attn: model.FlashAttention = True,
    verbose: model.Verbose = False,
) -> None:
    """Measure which layers of a GGUF model are lazy: which attend almost only to the first tokens and the last ones."""
    import numpy as np
    from rich.console import Console
    from rich.progress import track

    from lt_gguf.runtime.log import captured_errors

    if text is None:
        raise ValueError("--text is missing: give a UTF-8 text like what the model will read, a few hundred kilobytes of it")
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"--out = {out}: its folder doesn't exist")
    measured = AutoSpec(fraction, sink, window, w_last)
    described = read_model(file)
    check_can_stream(
        described.architecture,
        StreamingSpec(tuple(range(described.n_layer_main)), described.n_layer),
        described.n_layer_main,
        described.why_not_streaming,
    )
    length = length if length is not None else min(DEFAULT_LENGTH, described.n_ctx_train)
    if length <= sink + window:
        raise ValueError(f"--length = {length}: must be more than sink + window = {sink + window}, else every lazy ratio is 1")
    with captured_errors(forward=verbose):
        llm = model.load(
            file,
            ctx=batch_size,
            streaming="off",
            cache_type=cache_type,
            threads=threads,
            n_gpu_layers=n_gpu_layers,
            batch_size=batch_size,
            flash_attn=flash_attn,
            seed=0,
            verbose=verbose,
        )
        prompts = Samples(llm, text, samples, length)
        console = Console(stderr=True)
        measuring = track(
            measure(llm, prompts, measured),
            "Measuring",
            samples,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        ratios = np.mean(list(measuring), axis=0)
    found = LazyLayers(tuple(map(float, ratios)), measured, prompts.calibration)
    if out is not None:
        write_json(out, {"model": Path(file).name, "architecture": described.architecture} | found.describe())
    print_bars(found)


def print_bars(found: LazyLayers) -> None:
    """Prints a bar a layer; the lazy ones are marked."""
    from rich.console import Console
    from rich.table import Table

    calibration, measured = found.calibration, found.measured
    console = Console(highlight=False)
    table = Table("layer", "lazy ratio", "", "", box=None)
    table.columns[0].justify = table.columns[1].justify = "right"
    for il, ratio in enumerate(found.ratios):
        is_lazy = il in found.layers
        bar = "" if math.isnan(ratio) else f"{'█' * round(ratio * BAR_WIDTH):░<{BAR_WIDTH}}"
        value = "-" if math.isnan(ratio) else f"{ratio:.4f}"
        table.add_row(str(il), value, bar, "lazy" if is_lazy else "", style="green" if is_lazy else None)
    console.print(table)
    console.print(
        f"{calibration.samples} samples of {calibration.length} tokens, sink {measured.sink}, window {measured.window}, "
        f"last {measured.w_last} tokens of each",
        soft_wrap=True,
    )
    console.print(f'--streaming "{found.spec}"', soft_wrap=True, markup=False)
