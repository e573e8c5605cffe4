"""`lt-gguf inspect`: which layers stream, why, and what that saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lt_gguf.cli.model import CacheKeepOrRecommended, CacheTypeOrRecommended, ModelFile, Streaming, cache_of, find
from lt_gguf.gguf.file import read_model
from lt_gguf.report.inspection import describe, draw, print_tables


def inspect(
    file: ModelFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the lazy ratios, as .png or .svg.", show_default=False)
    ] = None,
    cache_type: CacheTypeOrRecommended = None,
    cache_keep: CacheKeepOrRecommended = None,
    streaming: Streaming = None,
) -> None:
    """Show which layers of a GGUF model stream, how they were chosen, and the memory of its KV cache with and without that."""
    model = read_model(find(file))
    spec = model.spec
    cache = cache_of(model, streaming, cache_type, cache_keep)
    if cache.streaming is not None:
        spec = model.parse_spec(str(cache.streaming))
        model.check_can_stream(spec)
    if plot is not None:
        draw(model, spec, plot)
    if as_json:
        print(json.dumps(describe(model, spec, str(cache.types)), indent=2))
    else:
        print_tables(model, spec, str(cache.types))
