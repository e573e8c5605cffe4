"""The process that runs upstream's `convert_hf_to_gguf.py` for `upstream`.

Upstream's code is used as it is, with four changes. Its `GGUFWriter` stops before it writes the header, when all of the
model's own metadata is known: it tells the parent what would be written, and waits for the streaming metadata to add. Its
progress bar reports to the parent. And each tensor that it reads is looked through for NaN, by a thread beside it. Code that the
checkpoint brings along isn't run, unless it is asked for (`checkpoint_code`).

stdin, lines of JSON: the request, then the metadata to add as {key: [type, value]}; the parent keeps it open as long as it
lives. stdout, lines of JSON: {"files": [[name, tensors, bytes], ...]} when the metadata is known (it is in the file
`METADATA_FILE` then), {"written": bytes, "total": bytes}, and at the end {"error": one line, empty if all went well}.
stderr: upstream's log if asked for.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import runpy
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import IO, Any

from lt_gguf.conversion import checkpoint_code
from lt_gguf.conversion.nan_check import NanCheck
from lt_gguf.gguf.header import LONGEST_ARRAY_READ
from lt_gguf.runtime.supervised import end_with_parent

METADATA_FILE = "metadata.gguf"  # a GGUF file of the model's metadata, without vocabulary and tensors
_LEVEL = {True: logging.INFO, False: logging.ERROR}
_PROGRESS_SECONDS = 0.1  # between two reports


def main() -> None:
    faulthandler.enable()  # the parent tells what a crash means, this where it was
    # note: stdout carries the messages alone, whatever upstream prints goes to stderr
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = json.loads(sys.stdin.readline())
    parent = _Parent(sys.stdin, messages, Path(request["hidden"]))
    error = _convert(request, parent)
    parent.done.set()
    parent.send(error=error)
    messages.close()
    # note: the watching thread holds stdin's lock, which Python would wait for
    os._exit(0)


class _Parent:
    """The other side: messages to it, and what it answers."""

    def __init__(self, stdin: IO[str], messages: IO[str], hidden: Path) -> None:
        self.hidden = hidden
        self.done = threading.Event()
        self._messages = messages
        self._answers: Queue[Any] = Queue()
        threading.Thread(target=self._listen, args=(stdin,), daemon=True).start()

    def send(self, **message: Any) -> None:
        print(json.dumps(message), file=self._messages, flush=True)

    def answer(self) -> Any:
        return self._answers.get()

    def _listen(self, stdin: IO[str]) -> None:
        if line := stdin.readline():
            self._answers.put(json.loads(line))
        end_with_parent(stdin, self.done)


def _convert(request: dict[str, Any], parent: _Parent) -> str:
    """Runs the converter; returns one line that says what is wrong, empty if nothing is."""
    log = _LastError()
    logging.basicConfig(level=_LEVEL[request["verbose"]], format="%(message)s", handlers=[logging.StreamHandler(), log])
    upstream = Path(request["upstream"])
    sys.path[:0] = [str(upstream), str(upstream / "gguf-py")]
    sys.argv = ["convert_hf_to_gguf.py", *request["arguments"]]
    try:
        if not request["trust_remote_code"]:
            checkpoint_code.forbid()
        _use_our_writer(parent)
        runpy.run_path(str(upstream / "convert_hf_to_gguf.py"), run_name="__main__")
    except SystemExit as error:
        if error.code:
            return _in_our_words(log.line)
    except Exception as error:
        if request["verbose"]:
            traceback.print_exc()
        return _describe(error)
    return ""


def _use_our_writer(parent: _Parent) -> None:
    import gguf
    import gguf.utility
    import tqdm

    plain_writer = gguf.GGUFWriter
    nan_check = NanCheck()
    mmap_bytes = gguf.utility.LocalTensor.mmap_bytes

    def checked_bytes(tensor: gguf.utility.LocalTensor) -> Any:
        nan_check.add(tensor.data_range.filename, tensor.data_range.offset, tensor.data_range.size, tensor.dtype)
        return mmap_bytes(tensor)

    class Bar:
        """Upstream's bars, a tqdm each: that of the whole model reports, that of a part does not."""

        def __init__(self, desc: str = "", total: int | None = None, **_: Any) -> None:
            self.total = total if desc == "Writing" else None
            self.written, self.reported = 0, 0.0

        def update(self, n: int) -> None:
            self.written += n
            now = time.monotonic()
            if self.total and (self.written == self.total or now - self.reported > _PROGRESS_SECONDS):
                self.reported = now
                parent.send(written=self.written, total=self.total)

        def reset(self, total: int | None = None) -> None: ...

        def set_description(self, desc: str) -> None: ...

    class StreamingGGUFWriter(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            if not any(self.tensors):
                raise ValueError("has no tensors that llama.cpp knows")
            self._write_metadata(parent.hidden / METADATA_FILE)
            out = path or self.path
            assert out is not None  # upstream's converter names one
            names = [file.name for file in self.format_shard_names(out)]
            sizes = [[len(tensors), sum(info.nbytes for info in tensors.values())] for tensors in self.tensors]
            parent.send(files=[[name, *size] for name, size in zip(names, sizes)])
            add: dict[str, Callable[[str, Any], None]] = {"uint32": self.add_uint32, "string": self.add_string}
            for key, (type_, value) in parent.answer().items():
                add.get(type_, self.add_array)(key, value)
            super().write_header_to_file(path)

        def _write_metadata(self, path: Path) -> None:
            writer = plain_writer(path, self.arch)
            writer.kv_data[0] |= {
                key: value
                for key, value in self.kv_data[0].items()
                if value.type != gguf.GGUFValueType.ARRAY or len(value.value) <= LONGEST_ARRAY_READ
            }
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()

        def write_tensors_to_file(self, *, progress: bool = False) -> None:
            tqdm.tqdm = Bar
            super().write_tensors_to_file(progress=progress)
            nan_check.finish()

    gguf.GGUFWriter = StreamingGGUFWriter  # type: ignore[misc]  # upstream makes one of ours
    gguf.utility.LocalTensor.mmap_bytes = checked_bytes  # type: ignore[assignment, method-assign]  # and reads with ours


class _LastError(logging.Handler):
    """Remembers the last error that was logged: upstream reports some that way before it exits."""

    line = "the converter gave up without saying why"

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        self.line = record.getMessage()


def _in_our_words(line: str) -> str:
    if unsupported := re.fullmatch(r"Model (\S+) is not supported", line):
        return f"upstream's converter doesn't support the architecture {unsupported[1]}"
    return _one_line(line.removeprefix("Error: "))


def _describe(error: Exception) -> str:
    if isinstance(error, ImportError) and error.name:
        return f"upstream's converter needs {error.name}: pip install 'lt-gguf[convert]'"
    # note: numpy's tofile() says so if the disk is full
    if isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", str(error)):
        return "the disk is full, or the file is larger than allowed"
    if isinstance(error, (ValueError, OSError)):
        return _one_line(str(error))
    return _one_line(f"upstream's converter failed: {type(error).__name__}: {error}; --verbose shows its log")


def _one_line(text: str) -> str:
    return " ".join(text.split())
