"""What an evaluation has measured, kept in a file while it is measured, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lt_gguf.evaluation.retrieval import Question
from lt_gguf.gguf.file import model_files
from lt_gguf.gguf.header import read_header

FORMAT_VERSION = 1

Record = dict[str, Any]
Records = dict[tuple[str, Question], Record]  # by the text of the spec, and the question


class Journal:
    """The records of an evaluation, each written as soon as there is one. A context manager.

    The file has a JSON object a line: first the settings, which are the same for all records, then the records.

    Args:
        path: of the file, which is made or continued; `None`: nothing is written.
        settings: everything but spec and question that decides what a record says.

    Attributes:
        records: what has been measured so far, also by earlier runs.

    Raises:
        ValueError: the file is of other settings, isn't one of ours, or is being written by another process; one line.
        OSError: it can't be read or written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.settings = {"version": FORMAT_VERSION, **settings}
        self.records: Records = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 (`close` does)
        try:
            self._lock(self._file, path)
            self._continue(self._file, path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, spec: str, question: Question, **values: Any) -> None:
        """Keeps what was measured with `spec`; not a second time what is there already. Raises OSError."""
        key = (spec, question)
        if key not in self.records:
            self._write({"spec": spec, **question._asdict(), **values})
            self.records[key] = values

    def _lock(self, file: BinaryIO, path: Path) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another evaluation is writing it, wait for its end or name another folder") from None

    def _continue(self, file: BinaryIO, path: Path) -> None:
        """Reads what is there; of a line that was cut off when it was written nothing is left."""
        file.seek(0)
        data = file.read()
        complete = data.rfind(b"\n") + 1
        if complete < len(data):
            file.truncate(complete)
        lines = data[:complete].split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                content = json.loads(line)
                if number == 1:
                    self._check(path, content["settings"])
                else:
                    spec, question = content.pop("spec"), Question(*(content.pop(field) for field in Question._fields))
                    self.records[spec, question] = content
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError):
                raise ValueError(f"{path}: line {number} isn't of an evaluation, remove it or name another folder") from None
        if not lines:
            self._write({"settings": self.settings})

    def _check(self, path: Path, settings: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(self.settings))
        for key in now | settings:
            if settings.get(key) != now.get(key):
                raise ValueError(
                    f"{path}: was measured with {key} = {_short(settings.get(key))}, this would be with {_short(now.get(key))}: "
                    "name another folder"
                )

    def _write(self, content: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(content, allow_nan=False).encode() + b"\n")
            self._file.flush()


def model_hash(path: Path) -> str:
    """SHA-256 of the model's file, of all its files one after the other if it is split.

    Raises:
        OSError: a file can't be read.
        ValueError: it isn't a GGUF model, or a part of it is missing.
    """
    digest = hashlib.sha256()
    for file in model_files(path, read_header(path)):
        with open(file, "rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> Path:
    """Writes a file as a whole or not at all. Raises OSError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        return unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
