"""What tells GGUF files apart: a fingerprint of a part of their bytes, and a hash of all.

The fingerprint takes milliseconds and is for what was measured of a file, where a few changed weights don't matter. The hash is for
what was computed with it and has to be the same bit for bit; it is remembered as long as the file isn't touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

_BEGINNING = 8 << 20  # bytes: metadata, vocabulary and the list of tensors of most files
_SAMPLES, _SAMPLE = 64, 1 << 16  # pieces of the rest, spread evenly, and bytes of each


def fingerprint(path: str | os.PathLike[str]) -> str:
    """64 hex digits that differ between files, and stay where a file is moved or copied.

    Of a file that is changed in a few bytes of its weights, they may stay the same.

    Raises:
        OSError: it can't be read.
    """
    size = Path(path).stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        digest.update(file.read(_BEGINNING))
        for i in range(_SAMPLES):
            place = _BEGINNING + (size - _BEGINNING - _SAMPLE) * i // (_SAMPLES - 1)
            if place >= _BEGINNING:
                file.seek(place)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def content_hash(path: str | os.PathLike[str], remembered: str | os.PathLike[str] | None = None) -> str:
    """The SHA-256 of a model's bytes, of all its files if it is split.

    Args:
        path: the first file.
        remembered: folder in which the hashes of files are kept that haven't been touched since (same place, size and times of
            change, to the nanosecond); `None`: nothing is remembered.

    Raises:
        OSError: a file can't be read.
    """
    digest = hashlib.sha256()
    for file in _files(Path(path)):
        digest.update(bytes.fromhex(_file_hash(file, remembered)))
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """The files of a split model, whose names end in -00001-of-00003.gguf; else the one."""
    stem, _, count = path.stem.rpartition("-of-")
    if not (count.isdecimal() and stem.endswith("-00001")):
        return [path]
    return [path.with_name(f"{stem[:-5]}{number:05}-of-{count}{path.suffix}") for number in range(1, int(count) + 1)]


def _file_hash(path: Path, remembered: str | os.PathLike[str] | None) -> str:
    status = os.stat(path)
    seen = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    note = (
        None if remembered is None else Path(remembered) / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
    )
    if note is not None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(note.read_text(encoding="utf-8"))
            if said["seen"] == seen:
                return str(bytes.fromhex(said["sha256"]).hex())
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if note is not None:
        with suppress(OSError):  # then it is hashed again the next time
            note.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=note.parent, encoding="utf-8", delete=False) as unfinished:
                json.dump({"file": path.name, "seen": seen, "sha256": found}, unfinished)
            os.replace(unfinished.name, note)
    return found
