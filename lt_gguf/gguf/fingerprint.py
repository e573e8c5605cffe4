"""A fingerprint of a GGUF file, to remember what was measured of it: of a part of its bytes, so that gigabytes needn't be read."""

from __future__ import annotations

import hashlib
import os
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
