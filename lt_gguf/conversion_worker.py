"""The process that runs upstream's `convert_hf_to_gguf.py` for `conversion.convert`.

Upstream's code is used as it is, with one change: its `GGUFWriter` adds the streaming metadata before it writes the
header. At that point all of the model's own metadata is known, so the checks are those made on a finished file.

stdin: a line of JSON, the request; the parent keeps it open as long as it lives. stdout: a line of JSON with `error`, empty
if all went well. stderr: progress, and upstream's log if asked for.
"""

from __future__ import annotations

import json
import logging
import os
import re
import runpy
import shutil
import sys
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from lt_gguf.architectures import layer_count, why_not_streaming
from lt_gguf.gguf_file import check_can_stream
from lt_gguf.spec import Provenance, StreamingSpec, Typed

_LEVEL = {True: logging.INFO, False: logging.ERROR}


def main() -> None:
    # note: stdout carries the answer alone, whatever upstream prints goes to stderr
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = json.loads(sys.stdin.readline())
    done = threading.Event()
    threading.Thread(target=_end_with_parent, args=(request["unfinished"], done), daemon=True).start()
    error = _convert(request)
    done.set()
    answer.write(json.dumps({"error": error}))
    answer.close()


def _end_with_parent(unfinished: str, done: threading.Event) -> None:
    sys.stdin.read()
    if not done.is_set():
        shutil.rmtree(unfinished, ignore_errors=True)
        os._exit(1)


def _convert(request: dict[str, Any]) -> str:
    """Runs the converter; returns one line that says what is wrong, empty if nothing is."""
    log = _LastError()
    logging.basicConfig(level=_LEVEL[request["verbose"]], format="%(message)s", handlers=[logging.StreamHandler(), log])
    upstream = Path(request["upstream"])
    sys.path[:0] = [str(upstream), str(upstream / "gguf-py")]
    sys.argv = ["convert_hf_to_gguf.py", *request["arguments"]]
    checkpoint = request["arguments"][0]
    try:
        _use_streaming_writer(request)
        runpy.run_path(str(upstream / "convert_hf_to_gguf.py"), run_name="__main__")
    except SystemExit as error:
        if error.code:
            return f"{checkpoint}: {_in_our_words(log.line)}"
    except Exception as error:
        if request["verbose"]:
            traceback.print_exc()
        return f"{checkpoint}: {_describe(error)}"
    return ""


def _use_streaming_writer(request: dict[str, Any]) -> None:
    import gguf

    class StreamingGGUFWriter(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            if not any(self.tensors):
                raise ValueError("has no tensors that llama.cpp knows")
            _check_destination(self.format_shard_names(path or self.path), request)
            metadata = {key: Typed(value.type.name.lower(), value.value) for key, value in self.kv_data[0].items()}
            for key, (type_, value) in _streaming_metadata(self.arch, metadata, request).items():
                add = {"uint32": self.add_uint32, "string": self.add_string}.get(type_, self.add_array)
                add(key, value)
            super().write_header_to_file(path)

    gguf.GGUFWriter = StreamingGGUFWriter


def _check_destination(files: list[Path], request: dict[str, Any]) -> None:
    for file in files:
        destination = Path(request["folder"]) / file.name
        if destination.exists() and not request["overwrite"]:
            raise FileExistsError(f"{destination} exists, remove it or use --overwrite")


def _streaming_metadata(arch: str, metadata: dict[str, Typed], request: dict[str, Any]) -> dict[str, Typed]:
    layers = layer_count(arch, metadata)
    sees = {key: request[key] for key in ("sink", "window", "prefill")}
    if request["layers"] is not None:
        selection = "manual"
        spec = StreamingSpec.parse(f"layers={request['layers']}", layers.all)
        spec = replace(spec, **sees)
    else:
        selection = "interleave"
        spec = StreamingSpec.interleaved(layers.main, request["fraction"], **sees)
        spec = replace(spec, n_layer=layers.all)
    check_can_stream(arch, spec, layers.main, why_not_streaming(arch, metadata))
    return spec.to_metadata(arch) | Provenance(selection).to_metadata()


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
    return _one_line(line)


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
