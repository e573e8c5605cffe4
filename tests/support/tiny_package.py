"""A named model in a wheel of its own, for an index that is a folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from lt_gguf.models.named import NamedModel

_INFO = "lt_gguf_tiny-1.0.dist-info"


def write_wheel(folder: Path, content: bytes) -> Path:
    """The wheel, whose only file is `lt_gguf_tiny/tiny.gguf` with that content, in a folder that is made."""
    folder.mkdir()
    path = folder / "lt_gguf_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lt_gguf_tiny/tiny.gguf", content)
        archive.writestr(f"{_INFO}/METADATA", "Metadata-Version: 2.1\nName: lt-gguf-tiny\nVersion: 1.0\n")
        archive.writestr(f"{_INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{_INFO}/RECORD", "")
    return path


def named_model(wheel: Path, content: bytes) -> NamedModel:
    """What is known of it."""
    return NamedModel(
        name="tiny",
        title="Tiny",
        description="nothing",
        licence="MIT",
        package="lt-gguf-tiny",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="lt_gguf_tiny/tiny.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        n_bytes=len(content),
    )
