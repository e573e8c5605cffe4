"""`lt-gguf run`: continue a prompt."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lt_gguf.cli import model


@model.takes_options(model.RunOptions)
def run(
    file: model.ModelFile,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; -: read it from stdin.")],
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Tokens to generate; -1: until the context is full.")] = -1,
    temperature: model.Temperature = model.DEFAULT_TEMPERATURE,
    *,
    options: model.RunOptions,
) -> None:
    """Continue a prompt with a GGUF model; the text goes to stdout."""
    from lt_gguf.runtime.log import captured_errors

    text = sys.stdin.read() if prompt == "-" else prompt
    with captured_errors(forward=options.verbose):
        llm = model.load(file, options)
        for chunk in llm(text, max_tokens=n_predict, temperature=temperature, stream=True):
            print(chunk["choices"][0]["text"], end="", flush=True)
        print()
