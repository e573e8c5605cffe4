"""`lt-gguf analyze`: which layers of a model are lazy, with a report and pictures."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from lt_gguf import calibration as texts_of
from lt_gguf import plots
from lt_gguf.auto_spec import AutoSpec
from lt_gguf.calibration import DEFAULT_FIELD, DEFAULT_LENGTH, DEFAULT_SAMPLES, Calibration, Texts
from lt_gguf.cli import model as model_options
from lt_gguf.gguf_file import check_can_stream, read_model
from lt_gguf.report import Report, check_destination
from lt_gguf.selection import Model, Request, asked_strategy, strategies
from lt_gguf.spec import DEFAULT_FRACTION, DEFAULT_SINK, DEFAULT_W_LAST, DEFAULT_WINDOW, StreamingSpec

BAR_WIDTH = 40


@model_options.takes_options(model_options.LoadOptions)
def analyze(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="GGUF file, folder of a Hugging Face checkpoint, or hub id.")],
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
    sink: Annotated[int, typer.Option(help="First positions that a streaming layer always sees.")] = DEFAULT_SINK,
    window: Annotated[int, typer.Option(help="Last positions that a streaming layer sees.")] = DEFAULT_WINDOW,
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
    if out is not None:
        plots.check()
        check_destination(out, overwrite)
    is_file = Path(model).suffix.lower() == ".gguf" or Path(model).is_file()
    if is_file and (device, dtype) != ("auto", "auto"):
        raise ValueError("--device and --dtype are for checkpoints: a GGUF file is measured with --n-gpu-layers as it is")
    subject = _GGUFFile(model, options) if is_file else _Checkpoint(model, device, dtype, options.threads)

    request = Request(subject.model, None, fraction, None, layers, threshold, sink, window)
    selection = None if chosen.needs_ratios else chosen.select(request)
    if selection is not None:  # note: a preset has its own, and its ratios must be those of what will stream
        sink, window = selection.sink, selection.window
    length = length if length is not None else min(DEFAULT_LENGTH, subject.n_ctx)
    texts_of.check_length(length, sink, window)
    texts = texts_of.read_texts(calibration, calibration_field)
    with _Progress() as progress:
        ratios = subject.measure(texts, samples, length, sink=sink, window=window, w_last=w_last, progress=progress)
    if selection is None:
        selection = chosen.select(replace(request, ratios=ratios))

    report = Report(
        subject.name,
        subject.model.architecture,
        selection.spec(subject.model.n_layer),
        selection,
        fraction if chosen.counts else None,
        w_last,
        ratios,
        Calibration(texts.name, texts.sha256, samples, length),
    )
    files = [] if out is None else report.write(out, overwrite)
    print_bars(report)
    if files:
        print(f"{out}: {', '.join(file.name for file in files)}")


class _GGUFFile:
    """A GGUF file, which the runtime measures."""

    def __init__(self, file: str, options: model_options.LoadOptions) -> None:
        described = read_model(file)
        every_layer = StreamingSpec(tuple(range(described.n_layer_main)), described.n_layer)
        check_can_stream(described.architecture, every_layer, described.n_layer_main, described.why_not_streaming)
        self._file, self._options = file, options
        self.name = Path(file).name
        self.model = Model(described.architecture, described.name, described.n_layer, described.n_layer_main)
        self.n_ctx = described.n_ctx_train

    def measure(self, texts: Texts, samples: int, length: int, **settings: Any) -> np.ndarray:
        from lt_gguf.runtime import analysis
        from lt_gguf.runtime.log import captured_errors

        options = model_options.RunOptions(**asdict(self._options), ctx=self._options.batch_size, streaming="off", seed=0)
        with captured_errors(forward=options.verbose):
            llm = model_options.load(self._file, options)
            prompts = texts_of.cut_samples(texts, *analysis.tokenizer(llm), samples, length)
            return analysis.measure(llm, prompts, **settings)


class _Checkpoint:
    """A Hugging Face checkpoint, which transformers measures layer by layer."""

    def __init__(self, name: str, device: str, dtype: str, threads: int) -> None:
        from lt_gguf import hub

        try:
            from lt_gguf.hf.checkpoint_checks import read_config
        except ImportError as error:
            raise ImportError(f"checkpoints need {error.name}: pip install 'lt-gguf[convert]'; GGUF files don't") from None
        self._folder = hub.resolve(name)
        self._settings = {"device": device, "dtype": dtype}
        self._threads = threads
        config = read_config(self._folder)
        text_config = config.get_text_config(decoder=True)
        n_layer = text_config.num_hidden_layers
        self.name = name if hub.is_hub_id(name) else self._folder.resolve().name
        said = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        # note: llama.cpp's name of the architecture is known when the checkpoint has been converted
        self.model = Model(text_config.model_type, self.name, n_layer, n_layer, said)
        self.n_ctx = getattr(text_config, "max_position_embeddings", None) or DEFAULT_LENGTH

    def measure(self, texts: Texts, samples: int, length: int, **settings: Any) -> np.ndarray:
        import torch

        from lt_gguf.hf import analysis

        if self._threads > 0:
            torch.set_num_threads(self._threads)
        prompts = texts_of.cut_samples(texts, *analysis.load_tokenizer(self._folder), samples, length)
        return analysis.measure(self._folder, prompts, **settings, **self._settings)


class _Progress:
    """A bar on stderr, where that is a terminal; call it with what is being done, steps done and steps in all."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("Measuring", total=None)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total, description=f"Measuring, {what}")


def print_bars(report: Report) -> None:
    """Prints a bar for each layer of a report that has ratios; the streaming ones are marked."""
    from rich.console import Console
    from rich.table import Table

    assert report.mean_ratios is not None
    console = Console(highlight=False)
    table = Table("layer", "lazy ratio", "", "", box=None)
    table.columns[0].justify = table.columns[1].justify = "right"
    for il, ratio in enumerate(report.mean_ratios):
        streams = report.spec.is_streaming(il)
        bar = "" if math.isnan(ratio) else f"{'█' * round(ratio * BAR_WIDTH):░<{BAR_WIDTH}}"
        value = "-" if math.isnan(ratio) else f"{ratio:.4f}"
        table.add_row(str(il), value, bar, "streams" if streams else "", style="green" if streams else None)
    console.print(table)
    for line in (
        f"{report.selection.strategy}: {report.selection.reason}",
        f"measured with {report.conditions}",
        f'--streaming "{report.spec}"',
    ):
        console.print(line, soft_wrap=True, markup=False)
