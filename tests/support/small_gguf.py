"""Small GGUF models that llama.cpp loads, made without torch, in the shapes that files come in."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import gguf

from lt_gguf.spec import Typed

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "checks"))

from tiny_model import write_tiny_model

N_LAYER = 4
TYPES = {type_.name.lower(): type_ for type_ in gguf.GGUFValueType}


@functools.cache
def _plain() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="small-gguf-")
    path = write_tiny_model(Path(folder.name) / "plain.gguf", N_LAYER)
    _folders.append(folder)
    return path


_folders: list[tempfile.TemporaryDirectory] = []  # gone with the process


def write_small(
    path: Path,
    *,
    keys: Mapping[str, Typed] | None = None,
    name: str = "small",
    alignment: int | None = None,
    version: int = 3,
    files: int = 1,
    tensors_in_first: bool = True,
) -> list[Path]:
    """Writes a random Llama of `N_LAYER` layers; `keys` are between its own ones. Returns the files, several if it is split."""
    reader = gguf.GGUFReader(_plain())
    per_file = -(-len(reader.tensors) // (files if tensors_in_first else files - 1)) if files > 1 else 0
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=per_file, small_first_shard=not tensors_in_first)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name(name)
    fields = [field for key, field in reader.fields.items() if not key.startswith(("GGUF.", "general."))]
    for i, field in enumerate(fields):
        if i == len(fields) // 2:
            for key, (type_, value) in (keys or {}).items():
                add(writer, key, type_, value)
        sub_type = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    written = sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf")) if files > 1 else [path]
    assert len(written) == files
    for file in written:
        with open(file, "r+b") as raw:
            raw.seek(4)
            raw.write(version.to_bytes(4, "little"))
    return written


def add(writer: gguf.GGUFWriter, key: str, type_: str, value: object) -> None:
    item = type_.removeprefix("array of ")
    if item == type_:
        writer.add_key_value(key, value, TYPES[type_])
    else:
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, TYPES[item])
