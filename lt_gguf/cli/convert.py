"""`lt-gguf convert`: a Hugging Face checkpoint becomes a hybrid GGUF file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lt_gguf.cli import common
from lt_gguf.spec import DEFAULT_PREFILL, DEFAULT_SINK, DEFAULT_WINDOW, format_layers


def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Folder of a Hugging Face checkpoint.")],
    outfile: Annotated[
        Path | None, typer.Option(help="File to write, or a folder to write it into; else the checkpoint's folder.")
    ] = None,
    outtype: Annotated[str, typer.Option(help="Type of the weights: f32, f16, bf16, q8_0 or auto.")] = "auto",
    streaming_layers: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Layers that stream: 1,3,5-9, all or none.")
    ] = None,
    streaming_fraction: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Or the share of layers that stream, spread evenly; 0.5: the odd layers."),
    ] = None,
    sink: Annotated[int, typer.Option(help="First positions that a streaming layer always sees.")] = DEFAULT_SINK,
    window: Annotated[int, typer.Option(help="Last positions that a streaming layer sees.")] = DEFAULT_WINDOW,
    prefill: Annotated[
        str, typer.Option(help="How a prompt is read: stream, or full (full attention in all layers).")
    ] = DEFAULT_PREFILL,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the log of upstream's converter.")] = False,
) -> None:
    """Convert a Hugging Face checkpoint to a GGUF file whose metadata says which layers stream."""
    from lt_gguf import conversion
    from lt_gguf.gguf_file import read_model

    _say(f"Converting {model}: upstream's converter is starting")
    files = conversion.convert(
        model,
        outfile,
        outtype=outtype,
        layers=streaming_layers,
        fraction=streaming_fraction,
        sink=sink,
        window=window,
        prefill=prefill,
        overwrite=overwrite,
        verbose=verbose,
    )
    written = read_model(files[0])
    spec = written.spec
    assert spec is not None
    layers = f" ({format_layers(spec.layers)})" if spec.layers else ""
    print(f"{files[0]}: {written.architecture}, {common.format_bytes(written.n_bytes)}")
    print(
        f"{len(spec.layers)} of {written.n_layer} layers stream{layers}: "
        f"sink {spec.sink}, window {spec.window}, prefill {spec.prefill}"
    )


def main() -> None:
    """The command of its own, `convert/hf_to_gguf_lt.py`."""
    app = common.new_app()
    app.command()(convert)
    common.run(app, "hf_to_gguf_lt.py")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
