"""Puts metadata of any kind into a GGUF file, also such that no writer would write."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import gguf

TYPES = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "string": (8, ""),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
ARRAY = 9
N_KEYS_OFFSET = 16  # in the file: magic, version, number of tensors, number of keys


def encode(key: str, type_: str, value) -> bytes:
    """The bytes of one key. `type_` is a name in `TYPES`, or "array of" one."""
    head = _string(key)
    if type_.startswith("array of "):
        item = type_.removeprefix("array of ")
        items = b"".join(_value(item, one) for one in value)
        return head + struct.pack("<IIQ", ARRAY, TYPES[item][0], len(value)) + items
    return head + struct.pack("<I", TYPES[type_][0]) + _value(type_, value)


def add_metadata(source: Path, target: Path, keys: Iterable[bytes]) -> Path:
    """Writes `target`: the file `source` with the encoded `keys` after its own ones. Returns `target`."""
    keys = list(keys)
    reader = gguf.GGUFReader(source)
    raw = source.read_bytes()
    end_of_keys = max(_end(field) for name, field in reader.fields.items() if not name.startswith("GGUF."))
    end_of_tensors = max(_end(tensor.field) for tensor in reader.tensors)
    (n_keys,) = struct.unpack_from("<Q", raw, N_KEYS_OFFSET)
    head = raw[:N_KEYS_OFFSET] + struct.pack("<Q", n_keys + len(keys)) + raw[N_KEYS_OFFSET + 8 : end_of_keys]
    head += b"".join(keys) + raw[end_of_keys:end_of_tensors]
    padding = -len(head) % reader.alignment
    target.write_bytes(head + b"\0" * padding + raw[reader.data_offset :])
    return target


def _end(field: gguf.ReaderField) -> int:
    return field.offset + sum(int(part.nbytes) for part in field.parts)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(type_: str, value) -> bytes:
    if type_ == "string":
        return _string(value)
    return struct.pack(f"<{TYPES[type_][1]}", value)
