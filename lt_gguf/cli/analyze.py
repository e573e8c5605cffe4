"""`lt-gguf analyze`: which layers of a model are lazy, with a report and pictures."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from lt_gguf import calibration as texts_of
from lt_gguf import models
from lt_gguf.calibration import DEFAULT_FIELD, DEFAULT_LENGTH, DEFAULT_SAMPLES, Calibration, Texts
from lt_gguf.cli import model as model_options
from lt_gguf.cli.common import print_candidates
from lt_gguf.cli.progress import ProgressBar
from lt_gguf.evaluation.candidates import DEFAULT_PUZZLES, check_puzzles
from lt_gguf.gguf.file import check_can_stream, read_model
from lt_gguf.report import plots
from lt_gguf.report.folder import check_destination, write_report
from lt_gguf.report.report import Report
from lt_gguf.selection import Model, Request, Strategy, asked_strategy, strategies
from lt_gguf.selection.evidence import Candidates
from lt_gguf.spec import DEFAULT_FRACTION, DEFAULT_PREFILL, DEFAULT_SINK, DEFAULT_W_LAST, DEFAULT_WINDOW, AutoSpec, StreamingSpec

BAR_WIDTH = 40


@model_options.takes_options(model_options.LoadOptions)
def analyze(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=f"Folder of a Hugging Face checkpoint, or its hub id; or {model_options.MODEL_HELP}")
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
        int, typer.Option(metavar="N", help="Generated prompts with a question, for selections that run the hybrid (kl, kl-greedy, auto).")
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
    subject = _GGUFFile(model, options) if is_file else _Checkpoint(model, device, dtype, options.threads)

    request = Request(subject.model, None, fraction, None, layers, threshold, sink, window)
    how = _Settings(
        calibration=calibration,
        calibration_field=calibration_field,
        samples=samples,
        puzzles=puzzles,
        length=length,
        w_last=w_last,
        prefill=prefill,
    )
    report = _analyze(subject, chosen, request, how)
    files = [] if out is None else write_report(report, out, overwrite)
    print_bars(report)
    print_candidates(report.selection, report.spec)
    if files:
        print(f"{out}: {', '.join(file.name for file in files)}")


def analyze_file(file: str, select: str, spec: StreamingSpec) -> Report:
    """What a strategy chooses in a GGUF file, by what it needs to measure and nothing else, with the defaults of the command.

    Args:
        spec: what streaming layers see, and how prompts are read; its layers don't count.

    Raises:
        ValueError: there is no such strategy, it needs more than a name, or it can't be measured.
        OSError: the file can't be read.
    """
    chosen = asked_strategy(select, None, None)
    subject = _GGUFFile(file, model_options.LoadOptions())
    request = Request(subject.model, sink=spec.sink, window=spec.window)
    return _analyze(subject, chosen, request, _Settings(prefill=spec.prefill, all_ratios=False))


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What is measured; each is the option of the command with its name. `all_ratios`: also lazy ratios that nothing needs."""

    calibration: Path | None = None
    calibration_field: str = DEFAULT_FIELD
    samples: int = DEFAULT_SAMPLES
    puzzles: int = DEFAULT_PUZZLES
    length: int | None = None
    w_last: int = DEFAULT_W_LAST
    prefill: str = DEFAULT_PREFILL
    all_ratios: bool = True


def _analyze(subject: _GGUFFile | _Checkpoint, chosen: Strategy, request: Request, how: _Settings) -> Report:
    selection = None if chosen.measures else chosen.select(request)
    seen = selection or request  # note: a preset has its own, and its ratios must be those of what will stream
    measured = {}
    if chosen.measures or how.all_ratios:
        length = how.length if how.length is not None else min(DEFAULT_LENGTH, subject.n_ctx)
        texts_of.check_length(length, seen.sink, seen.window)
        texts = texts_of.read_texts(how.calibration, how.calibration_field)
        with ProgressBar("Measuring") as bar:

            def show_progress(what: str, done: int, total: int) -> None:
                bar(f"Measuring, {what}", done, total)

            def announce(what: str, done: int, total: int) -> None:
                """What will be run is said before it is."""
                if done == 0:
                    bar.announce(what)
                show_progress(what, done, total)

            if chosen.needs_ratios or how.all_ratios:
                settings = {"sink": seen.sink, "window": seen.window, "w_last": how.w_last, "progress": show_progress}
                ratios = subject.measure(texts, how.samples, length, **settings)
                request = replace(request, ratios=ratios)
                calibration = Calibration(texts.name, texts.sha256, how.samples, length)
                measured = {"w_last": how.w_last, "ratios": ratios, "calibration": calibration}
            if chosen.measures_hybrid:
                spec = StreamingSpec((), subject.model.n_layer, seen.sink, seen.window, how.prefill)
                settings = {"samples": how.samples, "puzzles": how.puzzles, "length": length}
                with subject.candidates(texts, spec, **settings, progress=announce) as candidates:
                    selection = chosen.select(replace(request, candidates=candidates))
    selection = selection or chosen.select(request)
    spec = selection.spec(subject.model.n_layer, how.prefill)
    fraction = request.fraction if chosen.counts else None
    return Report(subject.name, subject.model.architecture, spec, selection, fraction, **measured)


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

    def candidates(self, texts: Texts, spec: StreamingSpec, **settings: Any) -> AbstractContextManager[Candidates]:
        from lt_gguf.evaluation.candidates import open_candidates

        options = model_options.scorer_options(self._options)
        return open_candidates(Path(self._file), spec, texts, options=options, **settings)


class _Checkpoint:
    """A Hugging Face checkpoint, which transformers measures layer by layer."""

    def __init__(self, name: str, device: str, dtype: str, threads: int) -> None:
        from lt_gguf.checkpoint import resolver
        from lt_gguf.models import hub

        try:
            from lt_gguf.checkpoint.checks import read_config
        except ImportError as error:
            raise ImportError(f"checkpoints need {error.name}: pip install 'lt-gguf[convert]'; GGUF files don't") from None
        self._folder = resolver.resolve(name)
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
