"""The command `lt-gguf`: one file a subcommand, each with a function of its own name."""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module
from typing import Annotated

import typer

from lt_gguf.cli.common import DEBUG, new_app, run_process
from lt_gguf.cli.version import Version

# note: `run` takes it away, wherever it stands
Debug = Annotated[bool, typer.Option(DEBUG, help="Show where an error comes from, with every command.")]

COMMANDS = ("convert", "train", "inspect", "analyze", "flag", "eval", "bench", "run", "chat", "serve", "cache", "doctor")


def build_app(commands: tuple[str, ...] = COMMANDS) -> typer.Typer:
    """The command line with these subcommands; each takes the imports of its own."""
    app = new_app(add_completion=True)

    @app.callback()  # note: else typer makes a lone subcommand the whole command
    def lt_gguf(version: Version = False, debug: Debug = False) -> None:
        """Hybrid GGUF models: convert, train, inspect, analyze, flag, evaluate, time, run and serve them."""

    for name in commands:
        app.command(name)(getattr(import_module(f"lt_gguf.cli.{name}"), name))
    return app


def main() -> None:
    # note: only what is asked for is imported, so that the start of a short command doesn't take longer than its work
    arguments = [word for word in _typed() if word != DEBUG]
    first = arguments[:1]
    commands = () if first == ["--version"] else tuple(name for name in first if name in COMMANDS) or COMMANDS
    run_process(partial(build_app, commands), "lt-gguf", sys.argv[1:] or ["--help"])


def _typed() -> list[str]:
    """The words behind `lt-gguf`; where a shell asks how they go on, those that are there so far."""
    if "_LT_GGUF_COMPLETE" not in os.environ:
        return sys.argv[1:]
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    return line.split()[1:]
