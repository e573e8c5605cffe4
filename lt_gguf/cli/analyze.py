"""`lt-gguf analyze`: which layers of a model are lazy, with a report and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lt_gguf import models
from lt_gguf.analysis import Checkpoint, GGUFFile, Settings, Subject
from lt_gguf.analysis import analyze as measure_and_choose
from lt_gguf.calibration import DEFAULT_FIELD, DEFAULT_LENGTH, DEFAULT_SAMPLES
from lt_gguf.cli import model as model_options
from lt_gguf.cli.progress import ProgressBar
from lt_gguf.evaluation.candidates import DEFAULT_QUESTIONS, check_questions
from lt_gguf.models.remembered import recall
from lt_gguf.report import plots
from lt_gguf.report.folder import check_destination, write_report
from lt_gguf.report.tables import print_bars, print_caches, print_candidates, print_warning
from lt_gguf.selection import DEFAULT_MAX_KL, DEFAULT_MAX_LOSS, LazyRatio, Request, asked_strategy, parse_share, strategies
from lt_gguf.selection.base import LONGEST_COMPARED, SEARCH_HELP, SEARCHED_WINDOWS
from lt_gguf.selection.tolerance import Tolerance
from lt_gguf.spec import DEFAULT_FRACTION, DEFAULT_PREFILL, DEFAULT_SINK, DEFAULT_W_LAST, DEFAULT_WINDOW, AutoSpec, StreamingSpec
from lt_gguf.spec.cache_types import parse_cache_types


@model_options.takes_options(model_options.MeasureOptions)
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
        float | None,
        typer.Option(
            "--streaming-fraction",
            metavar="SHARE",
            help="Share of the layers that is to stream; as many as lose no more than is tolerated by default, of other selections than "
            f"loss {DEFAULT_FRACTION}.",
        ),
    ] = None,
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
    questions: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Conversations about long texts that the layers are chosen by, and twice as many that the choice is judged by, "
            "for selections that run the hybrid (loss, kl, kl-greedy, auto).",
        ),
    ] = DEFAULT_QUESTIONS,
    max_loss: Annotated[
        str,
        typer.Option(
            metavar="SHARE",
            help="How much of what the full model finds may be lost, where no number of layers is asked for (loss).",
        ),
    ] = f"{DEFAULT_MAX_LOSS:.0%}",
    max_kl: Annotated[
        float, typer.Option(metavar="NATS", help="How far from the full model's its predictions may be (KL divergence), likewise.")
    ] = DEFAULT_MAX_KL,
    sink: Annotated[int, typer.Option(help="First positions that a streaming layer always sees.")] = DEFAULT_SINK,
    window: Annotated[int, typer.Option(help="Last positions that a streaming layer sees.")] = DEFAULT_WINDOW,
    search_window: Annotated[
        bool,
        typer.Option("--search-window", help=f"Try windows of {', '.join(map(str, SEARCHED_WINDOWS))}, too: {SEARCH_HELP} (loss)."),
    ] = False,
    cache_types: Annotated[
        str,
        typer.Option(
            metavar="TYPES",
            help="Types of the KV cache that are measured, too, with the chosen layers and with full attention, as in "
            "q8_0,q8_0/q4_0,q4_0 (K/V); each reads the texts twice (loss).",
        ),
    ] = "",
    prefill: Annotated[
        str, typer.Option(help="How a prompt is to be read: stream, or full (full attention in all layers).")
    ] = DEFAULT_PREFILL,
    w_last: Annotated[int, typer.Option(help="Last tokens of each sample whose attention is measured.")] = DEFAULT_W_LAST,
    device: Annotated[str, typer.Option(help="Where a checkpoint is measured: auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Type that a checkpoint is measured in: auto, float32, bfloat16, float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    *,
    options: model_options.MeasureOptions,
) -> None:
    """Measure which layers of a model are lazy: which attend almost only to the first tokens and the last ones.

    A GGUF file, quantized or not, is measured by the runtime; a checkpoint by transformers, one layer at a time.
    """
    is_file = models.is_gguf(model)
    if not is_file and select is None and layers is None and threshold is None:
        select = LazyRatio.name  # a checkpoint can't be run as a hybrid
    chosen = asked_strategy(select, layers, threshold)
    AutoSpec(DEFAULT_FRACTION if fraction is None else fraction, sink, window, w_last)  # checks these
    StreamingSpec((), 1, sink, window, prefill)
    check_questions(questions)
    Tolerance(tolerated := parse_share("--max-loss", max_loss), max_kl)
    if out is not None:
        plots.check()
        check_destination(out, overwrite)
    if is_file and (device, dtype) != ("auto", "auto"):
        raise ValueError("--device and --dtype are for checkpoints: a GGUF file is measured with --n-gpu-layers as it is")
    if chosen.measures_hybrid and not is_file:
        raise ValueError(
            f"selection {chosen.name}: runs the hybrid itself, must be asked of a GGUF file: "
            f"lt-gguf convert --select {chosen.name} makes it first"
        )
    asked_model = model
    if is_file:
        model = str(models.resolve(model, f"the folder of a checkpoint, {models.FORMS}"))
    asked: dict[str, Any] = {"fraction": fraction, "layers": layers, "threshold": threshold, "sink": sink, "window": window}
    subject: Subject
    if is_file:
        model_options.check_cache_keep(options.cache_keep, model)
        subject = GGUFFile(model, model_options.scorer_options(options), options.verbose)
    else:
        subject = Checkpoint(model, device, dtype, options.threads)
    if search_window:
        if not chosen.takes_tolerance:
            raise ValueError(f"selection {chosen.name}: takes no --search-window, only loss does")
        asked |= {"windows": SEARCHED_WINDOWS, "n_ctx": min(subject.n_ctx or LONGEST_COMPARED, LONGEST_COMPARED)}
    how = Settings(
        calibration=calibration,
        calibration_field=calibration_field,
        samples=samples,
        questions=questions,
        length=length,
        w_last=w_last,
        prefill=prefill,
        cache_types=parse_cache_types(cache_types),
    )
    with ProgressBar("Measuring") as bar:
        report = measure_and_choose(subject, chosen, Request(subject.model, **asked, max_loss=tolerated, max_kl=max_kl), how, bar)
    files = [] if out is None else write_report(report, out, overwrite)
    if report.ratios is not None:
        print_bars(report)
    print_candidates(report.selection, report.spec)
    print_caches(report)
    print_warning(report.selection)
    if is_file and chosen.takes_tolerance and recall(model) == report.spec:
        print(f"remembered: lt-gguf chat {asked_model} --streaming auto")
    if files:
        print(f"{out}: {', '.join(file.name for file in files)}")
