"""Processes and folders that go with the process that made them, whatever ends it.

A program that runs for minutes must not outlive a killed command, and no unfinished file may fill the disk. A child learns
that its parent is gone from its stdin, which only the parent holds open: it ends. Our own children watch it themselves
(`end_with_parent`); for llama.cpp's tools and for folders a small process does, which runs this file as a script.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_BOOTSTRAP = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from {} import main; main()"
# note: without what Python reads at its start for imports: they take ten milliseconds to be there
_SCRIPT = (sys.executable, "-I", "-S", __file__)
_KILLED = 128  # a process that a signal ended is reported as a shell does: 128 and the signal's number


def python(module: str) -> list[str]:
    """The command that runs `main()` of a module of ours, in a process that imports from the same places as this one."""
    return [sys.executable, "-c", _BOOTSTRAP.format(module), json.dumps(sys.path)]


def ending_with_stdin(command: Sequence[str]) -> list[str]:
    """The command that runs a program and ends it when its own stdin is closed, by whatever ends the process that holds it open."""
    return [*_SCRIPT, "run", *command]


def start(command: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    """Starts a program that ends when this process does, or when its `stdin` is closed.

    Its stdout and stderr are the pipe `stdout`.
    """
    return subprocess.Popen(
        ending_with_stdin(command),
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # note: a session of its own, so that Ctrl-C in a terminal reaches the parent alone, which then ends the program
        start_new_session=True,
    )


def signal_of(status: int) -> int:
    """The signal that ended a process with this exit status, 0 if none did."""
    return -status if status < 0 else max(0, status - _KILLED)


@contextmanager
def hidden_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """An `unfinished_folder` that goes with the end of this process, too."""
    from lt_gguf.gguf.unfinished import unfinished_folder  # note: the script that this file is, too, doesn't find it

    with unfinished_folder(parent, prefix) as folder:
        sweeper = subprocess.Popen([*_SCRIPT, "sweep", str(folder.absolute())], stdin=subprocess.PIPE, start_new_session=True)
        try:
            yield folder
        finally:
            sweeper.kill()
            sweeper.communicate()


def end_with_parent(stdin: IO[str], done: threading.Event) -> None:
    """Waits for the end of `stdin`, and ends this process if `done` isn't set by then."""
    stdin.read()
    if not done.is_set():
        os._exit(1)


def _run(command: Sequence[str]) -> None:
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent if sys.platform == "linux" else None)

    def watch() -> None:
        sys.stdin.read()
        program.kill()

    threading.Thread(target=watch, daemon=True).start()
    status = program.wait()
    # note: not sys.exit(), which would wait for stdin: the thread is reading it
    os._exit(status if status >= 0 else _KILLED - status)


def _die_with_parent() -> None:
    """For a program that is about to run: SIGKILL when this process, its parent, has gone, even if that had no time to do it."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _sweep(folder: str) -> None:
    sys.stdin.read()
    for _ in range(100):  # those who write there are about to end
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
        time.sleep(0.1)


if __name__ == "__main__":
    _run(sys.argv[2:]) if sys.argv[1] == "run" else _sweep(sys.argv[2])
