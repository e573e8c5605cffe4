"""What all commands share: how a command is run, and how its errors look."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from lt_gguf.runtime import crash
from lt_gguf.runtime.cpu import set_up_openmp

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended


DEBUG = "--debug"


def new_app(**settings: Any) -> typer.Typer:
    return typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, **{"add_completion": False} | settings)


def run_process(build: Callable[[], typer.Typer], name: str, arguments: Sequence[str]) -> NoReturn:
    """`run` in a process that is for this alone: a crash in native code tells what it can, and torch takes the cores that we take."""
    # note: no more than a subcommand's name, the other arguments may be nobody's business
    crash.enable(" ".join([name, *(word for word in arguments[:1] if word.isalpha())]))
    set_up_openmp()
    run(build, name, arguments)


def run(build: Callable[[], typer.Typer], name: str, arguments: Sequence[str]) -> NoReturn:
    """Builds and runs the command line, and exits: with 0, or with one line on stderr and another number. With `--debug` among the
    arguments, wherever that is, an error comes with its traceback."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    is_debugging = DEBUG in arguments[:end]
    arguments = [word for i, word in enumerate(arguments) if word != DEBUG or i >= end]
    try:
        status = build()(arguments, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # note: the reader has gone (`| head`); Python would complain once more when it flushes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_ERROR)
    except Exception as error:
        if is_debugging:
            traceback.print_exc()
        sys.exit(_report(error, name))
    sys.exit(status if isinstance(status, int) else 0)


def _report(error: Exception, name: str) -> int:
    """Prints the error in one line, returns the exit status."""
    if isinstance(error, typer.Abort):
        return EXIT_INTERRUPTED
    # note: a wrong option; typer has had click inside and outside of it, so the class has no lasting name
    if hasattr(error, "format_message"):
        command = getattr(getattr(error, "ctx", None), "command_path", name)
        text, status = f"{error.format_message()} ({command} --help shows what there is)", 2
    elif isinstance(error, OSError) and error.filename and error.strerror:
        text, status = f"{error.filename}: {error.strerror}", EXIT_ERROR
    elif isinstance(error, MemoryError):
        text, status = f"this process can get no more memory ({error or 'Python says no more'})", EXIT_ERROR
    elif isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
        text, status = str(error), EXIT_ERROR
    else:
        raise error
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return status
