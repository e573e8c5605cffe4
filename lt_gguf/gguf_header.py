"""Reads the metadata of a GGUF file.

gguf-py's `GGUFReader` makes an object for every token of the vocabulary: several seconds for a large one. It also trusts
every length in the file. This reader steps over long arrays and checks every length against the file's size; tensors are
not looked at. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lt_gguf.spec import Typed

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# Longer arrays are vocabularies; a model has at most 512 layers (LLAMA_MAX_LAYERS).
LONGEST_ARRAY_READ = 1024

_SCALARS = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "?"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
_STRING = 8
_ARRAY = 9


@dataclass(frozen=True)
class GGUFHeader:
    """What stands before the tensors of a GGUF file.

    Args:
        version: of the format.
        n_tensors: in this file (a split model has more in its other files).
        metadata: by key, in the file's order; the value of an array of more than `LONGEST_ARRAY_READ` items is None.
        size: of the file, in bytes.
    """

    version: int
    n_tensors: int
    metadata: dict[str, Typed]
    size: int


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Reads the header of the file at `path`.

    Raises:
        OSError: the file can't be opened.
        ValueError: it isn't a GGUF file, or is cut off or malformed.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != MAGIC:
            raise ValueError(f'{path}: is not a GGUF file, it doesn\'t begin with "GGUF"')
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(path, data).header(size)


class _Cursor:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.offset = len(MAGIC)

    def header(self, size: int) -> GGUFHeader:
        version = self.scalar("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            hint = " (its byte order is not this machine's)" if swapped in VERSIONS else ""
            raise ValueError(f"{self.path}: GGUF version {version}{hint}: must be 2 or 3")
        n_tensors, n_keys = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Typed] = {}
        for _ in range(n_keys):
            key = self.string()
            if key in metadata:
                raise ValueError(f"{self.path}: the key {key} is there twice")
            metadata[key] = self.value(key)
        return GGUFHeader(version, n_tensors, metadata, size)

    def take(self, n_bytes: int) -> int:
        """Steps over `n_bytes` and returns where they begin."""
        start, end = self.offset, self.offset + n_bytes
        if end > len(self.data):
            raise ValueError(f"{self.path}: is cut off, or malformed: its metadata goes on after the end of the file")
        self.offset = end
        return start

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def scalars(self, code: str, n: int) -> tuple[Any, ...]:
        # note: "=" is the machine's byte order without padding
        start = self.take(n * struct.calcsize(f"={code}"))
        return struct.unpack_from(f"={n}{code}", self.data, start)

    def string(self) -> str:
        n_bytes = self.scalar("Q")
        start = self.take(n_bytes)
        return self.data[start : start + n_bytes].decode("utf-8", errors="replace")

    def value(self, key: str) -> Typed:
        type_ = self.scalar("I")
        if type_ == _ARRAY:
            return self.array(key)
        if type_ == _STRING:
            return Typed("string", self.string())
        name, code = self.scalar_type(key, type_)
        return Typed(name, self.scalar(code))

    def array(self, key: str) -> Typed:
        type_, length = self.scalar("I"), self.scalar("Q")
        is_read = length <= LONGEST_ARRAY_READ
        if type_ == _STRING:
            if is_read:
                return Typed("array of string", [self.string() for _ in range(length)])
            for _ in range(length):
                self.take(self.scalar("Q"))
            return Typed("array of string", None)
        name, code = self.scalar_type(key, type_)
        if is_read:
            return Typed(f"array of {name}", list(self.scalars(code, length)))
        self.take(length * struct.calcsize(f"={code}"))
        return Typed(f"array of {name}", None)

    def scalar_type(self, key: str, type_: int) -> tuple[str, str]:
        if type_ not in _SCALARS:
            raise ValueError(f"{self.path}: {key} has the unknown type {type_}, the file is malformed")
        return _SCALARS[type_]
