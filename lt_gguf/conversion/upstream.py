"""Upstream's converter, run by `worker` in a process of its own.

It needs the gguf-py of the pinned source, which has the same name and version as PyPI's `gguf` but a different content, and
it keeps torch's memory out of this process.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lt_gguf.gguf.file import GGUFModel, read_model
from lt_gguf.runtime import supervised
from lt_gguf.runtime.crash import describe_death
from lt_gguf.runtime.library import upstream_dir
from lt_gguf.spec import Typed

_METADATA_FILE = "metadata.gguf"  # worker.METADATA_FILE, which imports what this process doesn't need
_WITHOUT_ANSWER = "the converter ended without saying why; --verbose shows its log"


class ConversionError(ValueError):
    """The checkpoint can't be converted; one line that says why."""


class PlannedFile(NamedTuple):
    """A file that is to be written; `n_bytes` are those of its tensors."""

    name: str
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True)
class Plan:
    """What upstream's converter is about to write: the model as its metadata describes it, and its files."""

    model: GGUFModel
    files: tuple[PlannedFile, ...]

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


class UpstreamConverter:
    """A conversion that stops when all is known but the streaming metadata. For a with block, at whose end it has ended.

    Args:
        name: the checkpoint, for messages.
        arguments: of upstream's `convert_hf_to_gguf.py`.
        hidden: folder for its files.
        verbose: show upstream's log on stderr.
        trust_remote_code: run Python code that the checkpoint brings along.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], hidden: Path, verbose: bool = False, trust_remote_code: bool = False
    ) -> None:
        self.name = name
        self.hidden = hidden
        self._doing = "reading the checkpoint"
        self._process = subprocess.Popen(
            supervised.python("lt_gguf.conversion.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # note: a session of its own, so that Ctrl-C in a terminal reaches this process alone, which then ends the worker
            start_new_session=True,
        )
        self._send(
            {
                "upstream": str(upstream_dir()),
                "arguments": list(arguments),
                "hidden": str(hidden),
                "verbose": verbose,
                "trust_remote_code": trust_remote_code,
            }
        )

    def __enter__(self) -> UpstreamConverter:
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        assert process.stdin and process.stdout
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()
        with suppress(BrokenPipeError):  # what it didn't read any more
            process.stdin.close()

    def plan(self) -> Plan:
        """Waits until upstream has read the checkpoint's metadata.

        Raises:
            ConversionError: the checkpoint can't be converted, or its metadata makes no sense.
        """
        message = self._receive()
        if "files" not in message:
            raise ConversionError(f"{self.name}: {message['error'] or _WITHOUT_ANSWER}")
        path = self.hidden / _METADATA_FILE
        try:
            model = read_model(path)
        except ValueError as error:
            raise ConversionError(f"{self.name}: {str(error).removeprefix(f'{path}: ')}") from None
        finally:
            path.unlink()
        return Plan(model, tuple(PlannedFile(*file) for file in message["files"]))

    def write(self, metadata: Mapping[str, Typed], progress: Callable[[int, int], None]) -> None:
        """Writes the files.

        Args:
            metadata: is added to what upstream writes.
            progress: is told how many bytes of how many are written.

        Raises:
            ConversionError: it failed.
        """
        self._doing = "writing the weights"
        self._send({key: [typed.type, typed.value] for key, typed in metadata.items()})
        while "error" not in (message := self._receive()):
            progress(message["written"], message["total"])
        if message["error"]:
            raise ConversionError(f"{self.name}: {message['error']}")

    def _send(self, message: Any) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: there is no answer, and `_receive` says so

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return json.loads(line)
        number = supervised.signal_of(self._process.wait())
        return {"error": describe_death("the converter", self._doing, number) if number else _WITHOUT_ANSWER}
