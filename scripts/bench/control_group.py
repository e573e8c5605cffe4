"""Runs a process in a control group that gives it so much memory and no more, as a smaller computer would."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lt_gguf.runtime.control_groups import group_folders

_MOUNTED = Path("/sys/fs/cgroup")


def run(command: list[str], n_bytes: int) -> str:
    """What it prints. What it maps from files counts, and is read again when there is no room for it.

    Raises:
        SystemExit: it fails, or such a group can't be made here (that takes root and Linux).
    """
    with _group(n_bytes) as members:

        def join() -> None:
            members.write_text(str(os.getpid()))

        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=join)
    if done.returncode:
        why = "took more memory than it was given" if done.returncode == -9 else (done.stderr.strip().splitlines() or ["?"])[-1]
        raise SystemExit(f"error: {why}")
    return done.stdout


@contextmanager
def _group(n_bytes: int) -> Iterator[Path]:
    """The file that processes join by."""
    try:
        folder, limit = _new_folder()
        (folder / limit).write_text(str(n_bytes))
    except OSError as error:
        raise SystemExit(f"error: no control group with a limit of memory can be made: {error}") from None
    try:
        yield folder / "cgroup.procs"
    finally:
        folder.rmdir()


def _new_folder() -> tuple[Path, str]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        mounted, limit = (_MOUNTED / "memory", "memory.limit_in_bytes") if controllers == "memory" else (_MOUNTED, "memory.max")
        if controllers in ("", "memory"):
            for parent in group_folders([mounted], path):
                if (parent / limit).exists():
                    folder = parent / f"lt-gguf-{os.getpid()}"
                    folder.mkdir()
                    return folder, limit
    raise FileNotFoundError("the kernel has none")
