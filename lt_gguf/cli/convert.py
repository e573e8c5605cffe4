"""`lt-gguf convert`: a Hugging Face checkpoint becomes a hybrid GGUF file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lt_gguf import models
from lt_gguf.cli import common, model
from lt_gguf.conversion.options import Options
from lt_gguf.memory.sizes import format_bytes
from lt_gguf.report.tables import print_candidates, print_warning
from lt_gguf.spec import format_layers

if TYPE_CHECKING:
    from lt_gguf.conversion import Converted, Progress


@model.takes_options(Options)
def convert(
    checkpoint: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face checkpoint, or its id on the hub.")],
    outfile: Annotated[
        Path | None,
        typer.Option(
            help="File to write, {ftype} in its name stands for the type of the weights; or a folder to write it into. "
            "Else the checkpoint's folder, of a model on the hub the current one."
        ),
    ] = None,
    options: Options = Options(),
) -> None:
    """Convert a Hugging Face checkpoint to a GGUF file in which lazy layers stream.

    As many layers stream as the model can spare: what is lost with them is measured, unless --select or --streaming-layers says
    otherwise, or the checkpoint was trained to stream in certain layers, which its config.json says then.
    """
    from lt_gguf import conversion

    if models.is_named(checkpoint) or (checkpoint.endswith(".gguf") and Path(checkpoint).is_file()):
        raise ValueError(
            f"{checkpoint}: is a GGUF file, not a checkpoint: lt-gguf flag {checkpoint} OUT.gguf says which layers stream"
        )
    with _progress() as progress:
        converted = conversion.convert(checkpoint, outfile, progress=progress, **asdict(options))
    if options.dry_run:
        _print_plan(converted)
    else:
        _print_result(converted)


def main() -> None:
    """The command of its own, `convert/hf_to_gguf_lt.py`."""
    app = common.new_app()
    app.command()(convert)
    common.run_process(lambda: app, "hf_to_gguf_lt.py", sys.argv[1:])


def _print_plan(converted: Converted) -> None:
    plan = converted.plan
    before = (
        "" if len(plan.files) == len(converted.files) and plan.files[0].name == converted.files[0].name else " before quantization"
    )
    for file, planned in zip(converted.files, plan.files):
        print(f"{file}: {planned.n_tensors} tensors, {format_bytes(planned.n_bytes)}{before}")
    if converted.spec is None:
        print(f"which of {plan.model.n_layer} layers stream has to be measured")
    else:
        _print_layers(converted)
    print("nothing was written (--dry-run)")


def _print_result(converted: Converted) -> None:
    n_bytes = sum(file.stat().st_size for file in converted.files)
    parts = f" and {len(converted.files) - 1} more files" if len(converted.files) > 1 else ""
    print(f"{converted.files[0]}{parts}: {converted.plan.model.architecture}, {format_bytes(n_bytes)}")
    _print_layers(converted)
    if converted.report_folder is not None:
        print(f"{converted.report_folder}: the report, and a model card to publish with the file")


def _print_layers(converted: Converted) -> None:
    spec, selection = converted.spec, converted.selection
    assert spec is not None and selection is not None
    layers = f" ({format_layers(spec.layers)})" if spec.layers else ""
    print(
        f"{len(spec.layers)} of {spec.n_layer} layers stream{layers}: "
        f"sink {spec.sink}, window {spec.window}, prefill {spec.prefill}"
    )
    if converted.recommended is not None:
        print(f"recommended for the KV cache: {converted.recommended}")
    print(f"{selection.strategy}: {selection.reason}")
    print_candidates(selection, spec)
    print_warning(selection)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Shows on stderr what is being done: a bar for each step in a terminal, else a line."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True, highlight=False)
    steps: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def show(what: str, done: int, total: int) -> None:
            # note: "Measuring layer 3" is one step with "Measuring layer 4"
            step = what.split()[0]
            if step not in steps:
                steps[step] = bars.add_task(what, total=None)
                if not console.is_terminal:
                    console.print(what, markup=False)
            bars.update(steps[step], description=what, completed=done, total=total or None)

        yield show
