"""Where Linux says what a process's control groups allow it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def group_folders(mounted: list[Path], path: str) -> Iterator[Path]:
    """The folders of a group and of those that it is in, up to where they are mounted.

    A container may see another path than the one that is mounted in it: its own group is then the top one.
    """
    relative = PurePosixPath(path.lstrip("/"))
    for folder in mounted:
        for group in (relative, *relative.parents):
            if ".." not in group.parts:
                yield folder / group


def read_or_empty(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
