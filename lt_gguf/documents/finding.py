"""Which files are meant: a path, a pattern, a folder with a pattern."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from lt_gguf.documents.document import DocumentError
from lt_gguf.documents.reading import SUFFIXES

_MOST_FILES = 500  # a pattern that means more is likely a mistake


def find_files(words: Sequence[str]) -> list[Path]:
    """The files that the words mean, in order, each once.

    A word is a file; a pattern (`notes/*.md`, `notes/**/*.md`); or a folder: of it the files that the next word, a pattern
    without a folder, means, or all documents that lie in it.

    Raises:
        DocumentError: nothing is there, or a folder holds no document.
    """
    found: list[Path] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        path = Path(word).expanduser()
        if path.is_dir():
            pattern = rest.pop(0) if rest and _is_pattern(rest[0]) and os.sep not in rest[0] else ""
            found += _in_folder(path, pattern)
        elif path.exists() or not _is_pattern(word):
            if not path.exists():
                raise DocumentError(f"{word}: there is no such file")
            found.append(path)
        else:
            found += _matches(str(path), word)
    if len(found) > _MOST_FILES:
        raise DocumentError(f"{' '.join(words)}: means {len(found)} files, must be at most {_MOST_FILES}")
    return list(dict.fromkeys(found))


def _is_pattern(word: str) -> bool:
    return glob.has_magic(word)


def _in_folder(folder: Path, pattern: str) -> list[Path]:
    if pattern:
        return _matches(os.path.join(glob.escape(str(folder)), pattern), os.path.join(folder, pattern))
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise DocumentError(f"{folder}: holds no document ({', '.join(SUFFIXES)}): name a pattern after it, such as '*.tex'")
    return found


def _matches(pattern: str, said: str) -> list[Path]:
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    if not found:
        raise DocumentError(f"{said}: no file is called so")
    return found
