"""The command `lt-gguf`: one file a subcommand."""

from __future__ import annotations

from lt_gguf.cli import analyze, chat, convert, flag, inspect, run
from lt_gguf.cli.common import new_app
from lt_gguf.cli.common import run as run_app

app = new_app(help="Hybrid GGUF models: convert, inspect, analyze and run them.", no_args_is_help=True)
app.command("convert")(convert.convert)
app.command("flag")(flag.flag)
app.command("inspect")(inspect.inspect)
app.command("analyze")(analyze.analyze)
app.command("run")(run.run)
app.command("chat")(chat.chat)


def main() -> None:
    run_app(app, "lt-gguf")
