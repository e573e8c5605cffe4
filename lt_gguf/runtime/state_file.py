"""A saved state of a context as a file: what it is, its parts, and a checksum over all of it.

    magic, version, length of the header · header (JSON) · the parts, one after the other · BLAKE2b of all that comes before

Nothing of it is handed to llama.cpp before the checksum has been compared. No pickles: what is read can't be code.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_MAGIC = b"LTSTATE1"
_HEAD = struct.Struct("<8sI")  # magic, bytes of the header
_LONGEST_HEADER = 1 << 20
_DIGEST = 32
_CHUNK = 8 << 20


class DamagedError(ValueError):
    """A file isn't a saved state, or no longer what was written."""


@dataclass(frozen=True)
class StateHeader:
    """What a file says of itself; not checked against its checksum.

    Args:
        fields: whatever was written with it, and can be written as JSON.
        parts: names and bytes of the parts, in their order.
        begin: where the first one begins in the file.
    """

    fields: dict[str, Any]
    parts: dict[str, int]
    begin: int

    @property
    def n_bytes(self) -> int:
        """Of the whole file."""
        return self.begin + sum(self.parts.values()) + _DIGEST

    def place(self, part: str) -> tuple[int, int]:
        """Where a part begins and ends. Raises DamagedError: there is none of that name."""
        begin = self.begin
        for name, n_bytes in self.parts.items():
            if name == part:
                return begin, begin + n_bytes
            begin += n_bytes
        raise DamagedError(f"has no part {part}")


def write_state(file: IO[bytes], fields: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Writes a state to an empty file that is open for writing.

    Args:
        fields: what the header says.
        parts: buffers (bytes, arrays) by name.

    Raises:
        OSError: it can't be written; what stands in the file then is no state.
    """
    views = {name: memoryview(part).cast("B") for name, part in parts.items()}
    header = json.dumps({"fields": dict(fields), "parts": {name: view.nbytes for name, view in views.items()}}).encode()
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for view in (memoryview(_HEAD.pack(_MAGIC, len(header))), memoryview(header), *views.values()):
        for begin in range(0, len(view), _CHUNK):
            digest.update(view[begin : begin + _CHUNK])
            file.write(view[begin : begin + _CHUNK])
    file.write(digest.digest())


def read_header(path: str | os.PathLike[str]) -> StateHeader:
    """What a file says of itself, if its length is right.

    Raises:
        DamagedError: it isn't a state, or cut off.
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        return _header(file, os.fstat(file.fileno()).st_size)


def read_part(path: str | os.PathLike[str], header: StateHeader, part: str) -> bytes:
    """One part, unchecked. Raises DamagedError, OSError."""
    begin, end = header.place(part)
    with open(path, "rb") as file:
        file.seek(begin)
        return file.read(end - begin)


@contextmanager
def opened_state(path: str | os.PathLike[str]) -> Iterator[tuple[StateHeader, dict[str, memoryview]]]:
    """The header and the parts of a whole file, mapped into memory: they are valid within the block.

    Raises:
        DamagedError: it isn't what was written.
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        header = _header(file, os.fstat(file.fileno()).st_size)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            digest = hashlib.blake2b(digest_size=_DIGEST)
            for begin in range(0, header.n_bytes - _DIGEST, _CHUNK):
                with view[begin : min(begin + _CHUNK, header.n_bytes - _DIGEST)] as chunk:
                    digest.update(chunk)
            with view[header.n_bytes - _DIGEST :] as kept:
                if kept != digest.digest():
                    raise DamagedError(f"{Path(path).name}: has changed since it was written")
            parts = {name: view[slice(*header.place(name))] for name in header.parts}
            try:
                yield header, parts
            finally:
                for part in parts.values():
                    part.release()


def _header(file: IO[bytes], n_bytes: int) -> StateHeader:
    name = Path(str(file.name)).name
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise DamagedError(f"{name}: isn't a saved state of this version")
    _, length = _HEAD.unpack(head)
    try:
        said = json.loads(file.read(length) if length <= _LONGEST_HEADER else b"")
        parts = {str(part): int(size) for part, size in said["parts"].items()}
        header = StateHeader(dict(said["fields"]), parts, _HEAD.size + length)
        is_whole = all(size >= 0 for size in parts.values()) and header.n_bytes == n_bytes
    except (ValueError, TypeError, KeyError, AttributeError):
        is_whole = False
    if not is_whole:
        raise DamagedError(f"{name}: is damaged or cut off")
    return header
