"""Reads the metadata of a GGUF file.

gguf-py's `GGUFReader` makes an object for every token of the vocabulary: several seconds for a large one. It also trusts
every length in the file. This reader steps over long arrays and checks every length against the file's size; of the tensors
it reads no more than where they are, and that only for `read_layout`.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lt_gguf.spec import Typed

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32

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
_NUMBERS = {name: (number, code) for number, (name, code) in _SCALARS.items()}
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


@dataclass(frozen=True)
class GGUFLayout:
    """Where the parts of a GGUF file are; ranges are of bytes, counted from its beginning.

    Args:
        header: what the file says.
        pairs: the bytes of each key-value pair, in the file's order and without gaps between them.
        tensor_infos: the names, shapes, types and offsets of the tensors, directly after the pairs.
        data: the tensors, to the end of the file; the offsets in `tensor_infos` count from where it begins.
        alignment: `data` begins at a multiple of it, after zeros.
    """

    header: GGUFHeader
    pairs: dict[str, range]
    tensor_infos: range
    data: range
    alignment: int


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Reads the header of the file at `path`.

    Raises:
        OSError: the file can't be opened.
        ValueError: it isn't a GGUF file, or is cut off or malformed.
    """
    with _open(Path(path)) as cursor:
        return cursor.header()


def read_layout(path: str | os.PathLike[str]) -> GGUFLayout:
    """Reads the header of the file at `path` and finds where its parts are. Raises as `read_header` does."""
    with _open(Path(path)) as cursor:
        return cursor.layout()


def encode_pair(key: str, typed: Typed) -> bytes:
    """The bytes of a key and its value, as they stand in a file.

    Raises:
        struct.error: the value doesn't fit its type.
    """
    item = typed.type.removeprefix("array of ")
    is_array = item != typed.type
    values = typed.value if is_array else [typed.value]
    if item == "string":
        number, data = _STRING, b"".join(map(_encode_string, values))
    else:
        number, code = _NUMBERS[item]
        data = struct.pack(f"={len(values)}{code}", *values)
    type_ = struct.pack("=IIQ", _ARRAY, number, len(values)) if is_array else struct.pack("=I", number)
    return _encode_string(key) + type_ + data


def _encode_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("=Q", len(data)) + data


def _shown(key: str) -> str:
    """The key for a message: that of a damaged file may be anything, and as long as the file."""
    return key if key.isprintable() and len(key) <= 100 else ascii(key[:40]) + "..."


@contextmanager
def _open(path: Path) -> Iterator[_Cursor]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != MAGIC:
            raise ValueError(f'{path}: is not a GGUF file, it doesn\'t begin with "GGUF"')
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _Cursor(path, data, size)


class _Cursor:
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size
        self.offset = len(MAGIC)
        self.pairs: dict[str, range] = {}

    def header(self) -> GGUFHeader:
        version = self.scalar("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            hint = " (its byte order is not this machine's)" if swapped in VERSIONS else ""
            raise ValueError(f"{self.path}: GGUF version {version}{hint}: must be 2 or 3")
        n_tensors, n_keys = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Typed] = {}
        for _ in range(n_keys):
            start = self.offset
            key = self.string()
            if key in metadata:
                raise ValueError(f"{self.path}: the key {_shown(key)} is there twice")
            metadata[key] = self.value(key)
            self.pairs[key] = range(start, self.offset)
        return GGUFHeader(version, n_tensors, metadata, self.size)

    def layout(self) -> GGUFLayout:
        header = self.header()
        alignment = self.alignment(header)
        start = self.offset
        offsets = [self.tensor_offset() for _ in range(header.n_tensors)]
        end = self.offset
        data = end + -end % alignment
        if not offsets and data > self.size:
            data = end  # as in the first file of some split models: nothing has to be aligned
        elif data + max(offsets, default=0) > self.size:
            raise ValueError(f"{self.path}: is cut off: some of its tensors begin after the end of the file")
        return GGUFLayout(header, self.pairs, range(start, end), range(data, self.size), alignment)

    def alignment(self, header: GGUFHeader) -> int:
        """The rule is llama.cpp's (`gguf_init_from_file_impl`)."""
        found = header.metadata.get(ALIGNMENT_KEY, Typed("uint32", DEFAULT_ALIGNMENT))
        type_, value = found
        if type_ != "uint32" or value < 1 or value & (value - 1):
            raise ValueError(f"{self.path}: {ALIGNMENT_KEY} = {value} ({type_}): must be an uint32 and a power of two")
        return value

    def tensor_offset(self) -> int:
        """Steps over what the file says of one tensor."""
        self.take(self.scalar("Q"))  # name
        self.take(8 * self.scalar("I") + 4)  # a number for each dimension, the type
        return self.scalar("Q")

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
            self.skip_strings(length)
            return Typed("array of string", None)
        name, code = self.scalar_type(key, type_)
        if is_read:
            return Typed(f"array of {name}", list(self.scalars(code, length)))
        self.take(length * struct.calcsize(f"={code}"))
        return Typed(f"array of {name}", None)

    def skip_strings(self, n: int) -> None:
        """Steps over `n` strings, in a loop that does as little as it can: a vocabulary has a quarter of a million."""
        read_length, data, at, last = struct.Struct("=Q").unpack_from, self.data, self.offset, len(self.data) - 8
        for _ in range(n):
            if at > last:
                at += 8  # where its length would end: after the end of the file, which `take` says
                break
            at += 8 + read_length(data, at)[0]
        self.take(at - self.offset)

    def scalar_type(self, key: str, type_: int) -> tuple[str, str]:
        if type_ not in _SCALARS:
            raise ValueError(f"{self.path}: {_shown(key)} has the unknown type {type_}, the file is malformed")
        return _SCALARS[type_]
