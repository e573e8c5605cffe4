"""`lt-gguf analyze`: which layers of a model are lazy, with a report and pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lt_gguf import models
from lt_gguf.analysis import Checkpoint, GGUFFile, Settings, Subject
from lt_gguf.analysis import analyze as measure_and_choose
from lt_gguf.calibration import DEFAULT_FIELD, DEFAULT_LENGTH, DEFAULT_SAMPLES
from lt_gguf.cli import model as model_options
from lt_gguf.cli.progress import ProgressBar
from lt_gguf.evaluation.candidates import DEFAULT_PUZZLES, check_puzzles
from lt_gguf.report import plots
from lt_gguf.report.folder import check_destination, write_report
from lt_gguf.report.tables import print_bars, print_candidates
from lt_gguf.selection import Request, asked_strategy, strategies
from lt_gguf.spec import DEFAULT_FRACTION, DEFAULT_PREFILL, DEFAULT_SINK, DEFAULT_W_LAST, DEFAULT_WINDOW, AutoSpec, StreamingSpec


@model_options.takes_options(model_options.LoadOptions)
def analyze(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help=f"Folder of a Hugging Face checkpoint, or its hub id; or {model_options.MODEL_HELP}"),
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the report and its pictures; it is made.")] = None,
    select: Annotated[
        str | None, typer.Option(metavar="STRATEGY", help=f"How layers are chosen: {', '.join(strategies())}.")
    ] = None,
    fraction: Annotated[
        float, typer.Option("--streaming-fraction", metavar="SHARE", help="Share of the layers that is to stream.")
    ] = DEFAULT_FRACTION,
    layers: Annotated[
        str | None, typer.Option("--streaming-layers", metavar="LAYERS", help="Layers that stream, as in 1,3,5-9 (manual).")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(metavar="RATIO", help="Smallest lazy ratio of a streaming layer (threshold).")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text or JSONL to measure on, like what the model will read; else built-in texts."),
    ] = None,
    calibration_field: Annotated[
        str, typer.Option(metavar="NAME", help="Field of each line of a JSONL file: a text, or a list of messages.")
    ] = DEFAULT_FIELD,
    samples: Annotated[int, typer.Option(help="Prompts that are cut out of the texts.")] = DEFAULT_SAMPLES,
    length: Annotated[
        int | None,
        typer.Option(
            "--calibration-length",
            metavar="TOKENS",
            help=f"Length of each; {DEFAULT_LENGTH} by default, or the model's context if that is smaller.",
        ),
    ] = None,
    puzzles: Annotated[
        int,
        typer.Option(
            metavar="N", help="Generated prompts with a question, for selections that run the hybrid (kl, kl-greedy, auto)."
        ),
    ] = DEFAULT_PUZZLES,
    sink: Annotated[int, typer.Option(help="First positions that a streaming layer always sees.")] = DEFAULT_SINK,
    window: Annotated[int, typer.Option(help="Last positions that a streaming layer sees.")] = DEFAULT_WINDOW,
    prefill: Annotated[
        str, typer.Option(help="How a prompt is to be read: stream, or full (full attention in all layers).")
    ] = DEFAULT_PREFILL,
    w_last: Annotated[int, typer.Option(help="Last tokens of each sample whose attention is measured.")] = DEFAULT_W_LAST,
    device: Annotated[str, typer.Option(help="Where a checkpoint is measured: auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Type that a checkpoint is measured in: auto, float32, bfloat16, float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    *,
    options: model_options.LoadOptions,
) -> None:
    """Measure which layers of a model are lazy: which attend almost only to the first tokens and the last ones.

    A GGUF file, quantized or not, is measured by the runtime; a checkpoint by transformers, one layer at a time.
    """
    chosen = asked_strategy(select, layers, threshold)
    AutoSpec(fraction, sink, window, w_last)  # checks these
    StreamingSpec((), 1, sink, window, prefill)
    check_puzzles(puzzles)
    if out is not None:
        plots.check()
        check_destination(out, overwrite)
    is_file = models.is_gguf(model)
    if is_file and (device, dtype) != ("auto", "auto"):
        raise ValueError("--device and --dtype are for checkpoints: a GGUF file is measured with --n-gpu-layers as it is")
    if chosen.measures_hybrid and not is_file:
        raise ValueError(
            f"selection {chosen.name}: runs the hybrid itself, must be asked of a GGUF file: "
            f"lt-gguf convert --select {chosen.name} makes it first"
        )
    if is_file:
        model = str(models.resolve(model, f"the folder of a checkpoint, {models.FORMS}"))
    request = partial(Request, n_streaming=None, fraction=fraction, layers=layers, threshold=threshold, sink=sink, window=window)
    subject: Subject
    if is_file:
        subject = GGUFFile(model, model_options.scorer_options(options), options.verbose)
    else:
        subject = Checkpoint(model, device, dtype, options.threads)
    how = Settings(
        calibration=calibration,
        calibration_field=calibration_field,
        samples=samples,
        puzzles=puzzles,
        length=length,
        w_last=w_last,
        prefill=prefill,
    )
    with ProgressBar("Measuring") as bar:
        report = measure_and_choose(subject, chosen, request(subject.model), how, bar)
    files = [] if out is None else write_report(report, out, overwrite)
    print_bars(report)
    print_candidates(report.selection, report.spec)
    if files:
        print(f"{out}: {', '.join(file.name for file in files)}")
