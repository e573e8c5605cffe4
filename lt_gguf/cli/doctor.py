"""`lt-gguf doctor`: what may be wrong here, and what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from lt_gguf import models
from lt_gguf.cli.model import MODEL_HELP
from lt_gguf.models.package import user_cache

if TYPE_CHECKING:
    from lt_gguf.runtime.diagnosis import Finding


def doctor(
    file: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help=f"A model to run for some seconds. {MODEL_HELP}", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run nothing: versions, library, processor, memory, folders.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Look at this installation and this computer: what is there, what is wrong, and what to do. Ends with 1 if something is."""
    found: list[Finding] = []
    for finding in look(file, quick):
        found.append(finding)
        if not as_json:
            print(f"{finding.what + ':':11}{finding.said}", flush=True)
            if finding.problem:
                print(f"{'':11}PROBLEM: {finding.problem}", flush=True)
    problems = [finding for finding in found if finding.problem]
    if as_json:
        print(json.dumps({"findings": [finding.to_json() for finding in found], "problems": len(problems)}, indent=2))
    else:
        print(f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else "no problem was found")
    if problems:
        raise typer.Exit(1)


def look(file: str | None, quick: bool) -> Iterator[Finding]:
    """One finding after the other, as they are made."""
    from lt_gguf.runtime import diagnosis

    yield from diagnosis.findings()
    if quick:
        return
    print("each kind of weights is tried, some seconds", file=sys.stderr)
    yield from diagnosis.check_weights()
    if file is None and not any((user_cache() / "models").glob(f"{models.DEFAULT_MODEL}-*/*.gguf")):
        yield diagnosis.Finding("model", f"none was run: lt-gguf doctor {models.DEFAULT_MODEL} downloads one and runs it")
        return
    try:
        yield from diagnosis.run_model(models.resolve(file or models.DEFAULT_MODEL))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        yield diagnosis.Finding("model", file or models.DEFAULT_MODEL, why)
