"""The command `lt-gguf`: one file a subcommand, each with a function of its own name."""

from __future__ import annotations

import sys
from importlib import import_module

import typer

from lt_gguf.cli.common import new_app, run_process
from lt_gguf.cli.version import Version

COMMANDS = ("convert", "train", "inspect", "analyze", "flag", "eval", "run", "chat", "serve", "cache", "doctor")


def build_app(commands: tuple[str, ...] = COMMANDS) -> typer.Typer:
    """The command line with these subcommands; each takes the imports of its own."""
    app = new_app()

    @app.callback()  # note: else typer makes a lone subcommand the whole command
    def lt_gguf(version: Version = False) -> None:
        """Hybrid GGUF models: convert, train, inspect, analyze, flag, evaluate, run and serve them."""

    for name in commands:
        app.command(name)(getattr(import_module(f"lt_gguf.cli.{name}"), name))
    return app


def main() -> None:
    # note: only what is asked for is imported, so that the start of a short command doesn't take longer than its work
    first = sys.argv[1:2]
    commands = () if first == ["--version"] else tuple(name for name in first if name in COMMANDS) or COMMANDS
    run_process(build_app(commands), "lt-gguf", sys.argv[1:] or ["--help"])
