"""`lt-gguf run`: continue a prompt."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lt_gguf.cli import model


@model.takes_options(model.RunOptions)
def run(
    file: model.ModelOrDefault = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Text to continue; without it, or with -: standard input.", show_default=False),
    ] = None,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Tokens to generate; -1: until the context is full.")] = -1,
    temperature: model.Temperature = model.DEFAULT_TEMPERATURE,
    *,
    options: model.RunOptions,
) -> None:
    """Continue a prompt with a GGUF model; the text goes to stdout."""
    from lt_gguf.runtime.log import captured_errors

    file = model.find(file)
    text = read_prompt() if prompt in (None, "-") else prompt
    with captured_errors(forward=options.verbose):
        llm = model.load(file, options)
        if sys.stderr.isatty():
            print(model.describe_threads(llm.n_threads), file=sys.stderr)
        for chunk in llm(text, max_tokens=n_predict, temperature=temperature, stream=True):
            print(chunk["choices"][0]["text"], end="", flush=True)
        print()


def read_prompt() -> str:
    """All of standard input. Raises ValueError: it isn't text in UTF-8, or there is nothing."""
    if sys.stdin is not None and sys.stdin.isatty():
        print(
            "the prompt is read from here until Ctrl-D at the beginning of a line (-p TEXT gives one)", file=sys.stderr, flush=True
        )
    try:
        text = sys.stdin.read() if sys.stdin is not None else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: isn't text in UTF-8: {error.reason} at byte {error.start}") from None
    text = text.removesuffix("\n")  # as llama.cpp does with the file of a prompt: it is the shell's, not the text's
    if not text:
        raise ValueError("standard input: is empty, must have the prompt; or give -p TEXT")
    return text
