"""What was chosen for a GGUF file by measuring it, in the user cache: measured once, used from then on by `streaming="auto"`.

It is kept under the file's fingerprint, so the file may be moved or renamed, and needn't be written to.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from lt_gguf.gguf.file import read_model
from lt_gguf.gguf.fingerprint import fingerprint
from lt_gguf.models.package import user_cache
from lt_gguf.spec import StreamingSpec

REMEMBERED = "auto"  # as a spec: what was chosen for the file

_FOLDER = "chosen"

T = TypeVar("T")


def remember(file: str | os.PathLike[str], spec: StreamingSpec) -> None:
    """Keeps what was chosen for a file, in place of what was chosen before.

    Raises:
        OSError: the file can't be read, or the cache can't be written; then all is as it was.
    """
    path = _path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    said = json.dumps({"file": Path(file).name, "streaming": str(spec), "n_layer": spec.n_layer}, indent=2) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as unfinished:
        try:
            unfinished.write(said)
            unfinished.close()
            os.replace(unfinished.name, path)
        except BaseException:
            os.unlink(unfinished.name)
            raise


def recall(file: str | os.PathLike[str]) -> StreamingSpec | None:
    """What was chosen for a file, `None`: nothing is known. Raises OSError: the file can't be read."""
    path = _path(file)
    with suppress(OSError, ValueError, KeyError, TypeError):  # what can't be read is measured again
        said = json.loads(path.read_text(encoding="utf-8"))
        return StreamingSpec.parse(said["streaming"], said["n_layer"])
    return None


def chosen_for(file: str | os.PathLike[str], streaming: T) -> tuple[T | StreamingSpec | None, str | None]:
    """What a spec means for a file: of `auto` what the file itself says, else what was chosen for it.

    Returns:
        the spec; `None` for what the file says. And where `auto` finds nothing, a line that says so and what to do; then `None`, too.

    Raises:
        ValueError: it isn't a GGUF file.
        OSError: it can't be read.
    """
    if not isinstance(streaming, str) or streaming.strip() != REMEMBERED:
        return streaming, None
    if read_model(file).spec is not None:
        return None, None
    found = recall(file)
    if found is not None:
        return found, None
    return None, f"{file}: no choice of streaming layers is known, so all have full attention: lt-gguf analyze measures it, once"


def _path(file: str | os.PathLike[str]) -> Path:
    return user_cache() / _FOLDER / f"{fingerprint(file)[:32]}.json"
