"""What all commands share: how a command is run, and how its errors look."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended


def new_app(**settings: Any) -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **settings)


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line, and exits: with 0, or with one line on stderr and another number."""
    try:
        status = app(arguments, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # note: the reader has gone (`| head`); Python would complain once more when it flushes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_ERROR)
    except Exception as error:
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
    elif isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
        text, status = str(error), EXIT_ERROR
    else:
        raise error
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return status


_UNITS = (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0))  # name, power of two


def format_bytes(n_bytes: int) -> str:
    """As llama.cpp writes memory: 544.00 MiB."""
    for unit, power in _UNITS[:-1]:
        if n_bytes >= 1 << power:
            return f"{n_bytes / (1 << power):.2f} {unit}"
    return f"{n_bytes} B"


def parse_size(text: str) -> int:
    """Reads a number of bytes: 512MiB, 1.5 GiB, 1048576.

    Raises:
        ValueError: the text is malformed.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGT]iB|B|)\s*", text, re.IGNORECASE)
    powers = {unit.lower(): power for unit, power in _UNITS} | {"": 0}
    if not found or "." in found[1] and found[2].lower() in ("", "b"):
        raise ValueError(f'size = "{text}": must be a number of bytes, or of KiB, MiB, GiB or TiB, as in 512MiB')
    return round(float(found[1]) * 2 ** powers[found[2].lower()]) if "." in found[1] else int(found[1]) << powers[found[2].lower()]
