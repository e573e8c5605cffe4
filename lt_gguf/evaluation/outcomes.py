"""`KnownOutcomes`: what has been measured of a model's layers, on disk, so that nothing is measured twice.

A measurement that was interrupted goes on where it was, and another choice among the same sets of layers costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lt_gguf.evaluation.probes import Document
from lt_gguf.gguf.fingerprint import fingerprint
from lt_gguf.models.package import user_cache
from lt_gguf.selection.evidence import Outcome
from lt_gguf.spec import StreamingSpec

if TYPE_CHECKING:
    from lt_gguf.evaluation.context import ScorerOptions

_FOLDER = "measured"
_VERSION = 1  # of what a line says


class KnownOutcomes:
    """Outcomes by set of layers, in a file of JSON lines if there is one.

    Args:
        path: the file; a line of it that can't be read is as if it weren't there. `None`: they are in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._found: dict[str, tuple[Outcome, ...]] = {}
        if path is not None:
            self._load(path)

    @classmethod
    def of(
        cls, file: Path, options: ScorerOptions, documents: Sequence[Document], beside: ScorerOptions | None = None
    ) -> KnownOutcomes:
        """Those of a GGUF file, asked about these documents; `beside`: how the full model was run that they were compared with, if that
        was otherwise."""
        said = [_VERSION, fingerprint(file), options.cache_type_k, options.cache_type_v, options.flash_attn]
        if options.cache_keep is not None:
            said.append(options.cache_keep)
        if beside is not None:
            said.append([beside.cache_type_k, beside.cache_type_v, beside.flash_attn])
        digest = hashlib.sha256(json.dumps([*said, [asdict(document) for document in documents]]).encode()).hexdigest()
        return cls(user_cache() / _FOLDER / f"{digest[:32]}.jsonl")

    def has(self, spec: StreamingSpec, layers: tuple[int, ...]) -> bool:
        return _key(spec, layers) in self._found

    def get(self, spec: StreamingSpec, layers: tuple[int, ...]) -> tuple[Outcome, ...]:
        """Raises KeyError: they aren't known."""
        return self._found[_key(spec, layers)]

    def add(self, spec: StreamingSpec, layers: tuple[int, ...], outcomes: Sequence[Outcome]) -> None:
        """Takes them and writes them down, if that is possible: it saves time, and isn't worth an error."""
        key = _key(spec, layers)
        self._found[key] = tuple(outcomes)
        if self._path is None:
            return
        line = json.dumps({"layers": key, "outcomes": [asdict(outcome) for outcome in outcomes]}) + "\n"
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, line.encode())  # at once, so that two processes can't mix their lines
            finally:
                os.close(descriptor)

    def count(self, spec: StreamingSpec) -> int:
        """How many sets are known, the full model included."""
        conditions = _key(spec, ()).partition(";")[2]
        return sum(key.partition(";")[2] == conditions for key in self._found)

    def _load(self, path: Path) -> None:
        with suppress(OSError, UnicodeDecodeError):
            for line in path.read_text(encoding="utf-8").split("\n"):
                with suppress(ValueError, KeyError, TypeError):  # half a line, where a process was killed
                    said = json.loads(line)
                    self._found[said["layers"]] = tuple(Outcome(**outcome) for outcome in said["outcomes"])


def _key(spec: StreamingSpec, layers: tuple[int, ...]) -> str:
    return replace(spec, layers=layers).hide_text()
