"""`lt-gguf flag`: say which layers of an existing GGUF file stream."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lt_gguf import models
from lt_gguf.cli.model import MeasureOptions, ModelFile, find, one_of, scorer_options
from lt_gguf.cli.progress import ProgressBar
from lt_gguf.gguf.file import GGUFModel, read_model
from lt_gguf.gguf.flagging import Progress, flag_in_place
from lt_gguf.gguf.flagging import flag as write_flagged
from lt_gguf.memory.sizes import format_bytes
from lt_gguf.models.remembered import recall
from lt_gguf.report.report import Report
from lt_gguf.report.tables import print_candidates, print_warning
from lt_gguf.selection import DEFAULT_STRATEGY, Request, asked_strategy
from lt_gguf.spec import CacheRecommendation, Provenance, StreamingSpec, format_layers, parse_layers
from lt_gguf.spec.cache_types import CACHE_TYPES

_INHERITED = "by default as the report or the file says, else"

RecommendedType = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        autocompletion=one_of(CACHE_TYPES),
        help=f"Recommend this type of the KV cache: {', '.join(CACHE_TYPES)}; or those of K and V, as in q8_0/q4_0.",
    ),
]
RecommendedKeep = Annotated[
    str | None,
    typer.Option(metavar="LAYERS", help="Recommend to keep the KV cache of these layers in 16 bits, as in 0,2-3, all or none."),
]
RecommendedBreaks = Annotated[
    str | None,
    typer.Option(metavar="TYPES", help="Types of the KV cache that break the model, to warn of: as in q4_0,q8_0/q4_0, or none."),
]


def flag(
    file: ModelFile,
    outfile: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="File to write, the first one of a split model, or a folder.", show_default=False),
    ] = None,
    streaming_layers: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Layers that stream: 1,3,5-9, all or none.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--from", metavar="REPORT.json", help="Or what lt-gguf analyze or convert has found and written."),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            metavar="STRATEGY",
            help="Or measure now, as lt-gguf analyze does, which has more options. Without any of these, a file that says nothing gets "
            "what was chosen for it, or measures loss: as many layers as the model can spare.",
            show_default=False,
        ),
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Or make it an ordinary model: remove all that we have written.")] = False,
    sink: Annotated[
        int | None, typer.Option(help=f"First positions that a streaming layer always sees, {_INHERITED} 4.", show_default=False)
    ] = None,
    window: Annotated[
        int | None, typer.Option(help=f"Last positions that a streaming layer sees, {_INHERITED} 1020.", show_default=False)
    ] = None,
    prefill: Annotated[
        str | None,
        typer.Option(help=f"How a prompt is read: stream, or full (full attention in all layers), {_INHERITED} full."),
    ] = None,
    cache_type: RecommendedType = None,
    cache_keep: RecommendedKeep = None,
    cache_breaks: RecommendedBreaks = None,
    no_cache_types: Annotated[
        bool, typer.Option("--no-cache-types", help="Remove what the file recommends for the KV cache.")
    ] = False,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change the file itself, where that is safe: where only a few bytes change.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Change which layers of a GGUF file stream, and what it recommends for the KV cache, without converting it again: its tensors are
    copied as they are."""
    sees = {key: value for key, value in (("sink", sink), ("window", window), ("prefill", prefill)) if value is not None}
    options = (("cache-type", cache_type), ("cache-keep", cache_keep), ("cache-breaks", cache_breaks))
    cache = {key: value for key, value in options if value is not None}
    _check_options(streaming_layers, report, select, off, sees, cache, no_cache_types)
    if (outfile is None) != in_place:
        raise ValueError(f"{file}: give the file to write after it, or --in-place, and not both")
    measures = select is not None or not (streaming_layers or report or off)
    changes_cache = bool(cache) or no_cache_types
    # note: of a file that says nothing of its layers, they stay as they are
    keeps_layers = changes_cache and not (streaming_layers or report or off or select or sees)
    if measures and outfile is not None and outfile.is_file() and not overwrite:
        raise FileExistsError(f"{outfile}: exists, remove it or use --overwrite")  # now, not after hours of measuring
    if in_place and not models.is_path(file):
        raise ValueError(f"{file}: lies in a cache, which is for all who use it: give the file to write after it, not --in-place")
    file = find(file)
    spec, provenance, recommended = None, None, None
    if not off:
        described = read_model(file, takes_recommended=not no_cache_types)
        if not no_cache_types:
            recommended = _recommended(described, report, cache_type, cache_keep, cache_breaks)
        if keeps_layers:
            spec, provenance = described.spec, described.provenance
        else:
            spec, provenance = _choose(described, streaming_layers, report, select, sees)
        if recommended is not None and recommended == described.recommended and not changes_cache:
            _note_other_layers(described, spec)
    if outfile is None:
        if not flag_in_place(file, spec, provenance, recommended):
            print(f"{file}: says that already, nothing was changed", file=sys.stderr)
        written = file
    else:
        with _progress() as progress, _signals_as_exceptions():
            written = str(write_flagged(file, outfile, spec, provenance, progress, overwrite, recommended)[0])
    _print_summary(written, read_model(written))


def _check_options(
    layers: str | None,
    report: Path | None,
    select: str | None,
    off: bool,
    sees: dict[str, Any],
    cache: dict[str, Any],
    no_cache_types: bool,
) -> None:
    options = (("--streaming-layers", layers), ("--from", report), ("--select", select), ("--off", off))
    chosen = [name for name, given in options if given]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)}: give one of them")
    if off and (sees or cache):
        raise ValueError(f"--off removes what --{next(iter(sees | cache))} would change: give one of them")
    if no_cache_types and cache:
        raise ValueError(f"--no-cache-types removes what --{next(iter(cache))} would change: give one of them")


def _recommended(
    model: GGUFModel, report: Path | None, types: str | None, keep: str | None, breaks: str | None
) -> CacheRecommendation | None:
    """What the new file recommends for the cache: the types that a report has measured with its layers, else what the file recommends,
    and before both what is asked for.

    Raises:
        ValueError: an option is out of range, the model can't have such a cache, or it is no report.
        OSError: the report can't be read.
    """
    layers = None if keep is None else parse_layers(keep, model.n_layer_main, "--cache-keep")
    base, measured = model.recommended, Report.read(report).caches if report is not None else None
    if measured is not None:
        base = CacheRecommendation(model.n_layer, measured.recommended, base.keep if base else (), measured.breaking)
    found = CacheRecommendation.changed(base, model.n_layer, types, layers, breaks)
    model.check_recommended(found)
    return found


def _note_other_layers(model: GGUFModel, spec: StreamingSpec | None) -> None:
    """Says if layers that stream in the file don't any more: they would get the recommended types, with which nobody measured them."""
    left = set(model.spec.layers if model.spec else ()) - set(spec.layers if spec else ())
    if left:
        several = len(left) > 1
        print(
            f"note: layer{'s' if several else ''} {format_layers(left)} streamed when types of the KV cache were recommended, and "
            f"{'get' if several else 'gets'} them now: --cache-type or --cache-keep recommends others, --no-cache-types none",
            file=sys.stderr,
        )


def _choose(
    model: GGUFModel, layers: str | None, report: Path | None, select: str | None, sees: dict[str, Any]
) -> tuple[StreamingSpec, Provenance | None]:
    """The new spec and how its layers were chosen.

    Raises:
        ValueError: an option is out of range, or the report isn't one of this model.
        OSError: the report can't be read.
    """
    if report is not None:
        spec, provenance = _from_report(model, report)
        return replace(spec, **sees), provenance
    if select is not None:
        return _measure(model, select, replace(model.spec or StreamingSpec.off(model.n_layer), layers=(), **sees))
    if layers is not None:
        base = model.spec or StreamingSpec.off(model.n_layer)
        # note: what was measured on the model stays true of it, whatever layers somebody chooses then
        measured = model.provenance or Provenance("")
        spec = replace(base, layers=parse_layers(layers, model.n_layer, every=model.may_stream), **sees)
        return spec, replace(measured, selection="manual")
    if model.spec is None:
        return _spare(model, sees)
    if not sees:
        raise ValueError(
            f"{model.path}: says already which layers stream: give --select STRATEGY to choose others, --streaming-layers, as in 1,3,5-9, "
            "--from REPORT.json or --off, or, so that the layers stay as they are, --sink, --window or --prefill"
        )
    return replace(model.spec, **sees), model.provenance


def _spare(model: GGUFModel, sees: dict[str, Any]) -> tuple[StreamingSpec, Provenance]:
    """What was chosen for a file that says nothing, else what `loss` chooses now."""
    remembered = None if sees else recall(model.path)
    if remembered is not None:
        print(f"{DEFAULT_STRATEGY}: as it was chosen before; --select {DEFAULT_STRATEGY} measures again", file=sys.stderr)
        return remembered, Provenance(DEFAULT_STRATEGY)
    return _measure(model, DEFAULT_STRATEGY, replace(StreamingSpec.off(model.n_layer), **sees))


def _measure(model: GGUFModel, select: str, spec: StreamingSpec) -> tuple[StreamingSpec, Provenance]:
    """What a strategy chooses, where streaming layers see what `spec` says."""
    from lt_gguf.analysis import GGUFFile, Settings, analyze

    chosen = asked_strategy(select, None, None)
    subject = GGUFFile(str(model.path), scorer_options(MeasureOptions()))
    request = Request(subject.model, sink=spec.sink, window=spec.window)
    with ProgressBar("Measuring") as bar:
        report = analyze(subject, chosen, request, Settings(prefill=spec.prefill, all_ratios=False), bar)
    print(f"{report.selection.strategy}: {report.selection.reason}")
    print_candidates(report.selection, report.spec)
    print_warning(report.selection)
    print(f'--streaming "{report.spec}"')  # note: so that it isn't lost if the file can't be written
    return report.spec, report.provenance


def _from_report(model: GGUFModel, path: Path) -> tuple[StreamingSpec, Provenance]:
    report = Report.read(path)
    n_layer = report.spec.n_layer
    # note: a checkpoint may have been measured without the layers that only predict ahead
    if n_layer not in (model.n_layer, model.n_layer_main):
        raise ValueError(f"{path}: is of a model of {n_layer} layers, {model.path} has {model.n_layer}")
    # note: no error, transformers has other names: mistral is llama in llama.cpp
    if report.architecture != model.architecture:
        note = f"note: {path} is of {report.model} ({report.architecture}), {model.path} is a {model.architecture}"
        print(note, file=sys.stderr)
    provenance = report.provenance
    if provenance.lazy_ratio is not None:
        not_measured = (math.nan,) * (model.n_layer - n_layer)
        provenance = replace(provenance, lazy_ratio=provenance.lazy_ratio + not_measured)
    return replace(report.spec, n_layer=model.n_layer), provenance


def _print_summary(file: str, model: GGUFModel) -> None:
    print(f"{file}: {model.architecture}, {format_bytes(model.n_bytes)}")
    spec = model.spec
    if spec is None or not spec.layers:
        print("no layer streams: an ordinary model")
    else:
        print(
            f"{len(spec.layers)} of {model.n_layer} layers stream ({format_layers(spec.layers)}): "
            f"sink {spec.sink}, window {spec.window}, prefill {spec.prefill}"
        )
    if model.recommended is not None:
        print(f"recommended for the KV cache: {model.recommended}")


@contextmanager
def _progress() -> Iterator[Progress]:
    """Shows how far the copy is, if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Display

    console = Console(stderr=True)
    columns = (TextColumn("Copying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Display(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task("Copying")
        yield lambda done, total: display.update(task, completed=done, total=total)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Lets `kill` and a closed terminal end the process as Ctrl-C does, so that unfinished files are removed."""

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)  # as a shell reports it

    # note: nohup has a closed terminal ignored
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
