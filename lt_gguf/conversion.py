"""Converts a Hugging Face checkpoint to a hybrid GGUF file with upstream's converter.

Upstream's converter runs in a process of its own (`conversion_worker`): it needs the gguf-py of the pinned source, which
has the same name and version as PyPI's `gguf` but a different content, and it keeps torch and transformers out of this
process. The files grow in a hidden folder beside their destination and are moved only when they are complete, so whatever
ends the conversion, under the final name there is either a finished file or nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lt_gguf.runtime.library import upstream_dir
from lt_gguf.spec import DEFAULT_PREFILL, DEFAULT_SINK, DEFAULT_WINDOW, StreamingSpec, parse_layers

OUTPUT_TYPES = ("f32", "f16", "bf16", "q8_0", "auto")

_MOST_LAYERS = 512  # LLAMA_MAX_LAYERS: how many there are is known when upstream has read the checkpoint
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_BOOTSTRAP = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from lt_gguf.conversion_worker import main; main()"


class ConversionError(ValueError):
    """The checkpoint can't be converted; one line that says why."""


def convert(
    checkpoint: str | os.PathLike[str],
    outfile: str | os.PathLike[str] | None = None,
    *,
    outtype: str = "auto",
    layers: str | None = None,
    fraction: float | None = None,
    sink: int = DEFAULT_SINK,
    window: int = DEFAULT_WINDOW,
    prefill: str = DEFAULT_PREFILL,
    overwrite: bool = False,
    verbose: bool = False,
) -> list[Path]:
    """Writes `checkpoint` as a GGUF file whose metadata says which layers stream.

    Args:
        checkpoint: folder of a Hugging Face checkpoint.
        outfile: file to write, or a folder, in which upstream names the file; the checkpoint's own if not given.
        outtype: one of `OUTPUT_TYPES`.
        layers: the streaming layers, as in `1,3,5-9`, `all` or `none`.
        fraction: instead of `layers`, the share of the layers that stream, spread evenly.
        sink: first positions that stay visible.
        window: last positions that stay visible.
        prefill: `full` or `stream`.
        overwrite: replace an existing file.
        verbose: show upstream's log on stderr.

    Returns:
        The files written (several if the model is split).

    Raises:
        ValueError: a wrong argument, or a checkpoint that can't be converted (`ConversionError`).
        OSError: a file can't be read or written.
    """
    checkpoint = Path(checkpoint)
    _check_arguments(outtype, layers, fraction, sink, window, prefill)
    _check_checkpoint(checkpoint)
    folder, name = _destination(checkpoint, outfile, overwrite)
    request: dict[str, Any] = {
        "layers": layers,
        "fraction": fraction,
        "sink": sink,
        "window": window,
        "prefill": prefill,
        "folder": str(folder),
        "overwrite": overwrite,
        "verbose": verbose,
        "upstream": str(upstream_dir()),
    }
    with _hidden_folder(folder) as unfinished:
        request["unfinished"] = str(unfinished)
        request["arguments"] = [str(checkpoint), "--outfile", str(unfinished / name), "--outtype", outtype]
        _run_worker(request)
        return [_publish(file, folder / file.name) for file in sorted(unfinished.iterdir())]


def _check_arguments(
    outtype: str, layers: str | None, fraction: float | None, sink: int, window: int, prefill: str
) -> None:
    if outtype not in OUTPUT_TYPES:
        raise ValueError(f'outtype = "{outtype}": must be one of {", ".join(OUTPUT_TYPES)}')
    if (layers is None) == (fraction is None):
        raise ValueError("which layers stream: give either the layers, as in 1,3,5-9, or their fraction, as in 0.5")
    if layers is not None:
        parse_layers(layers, _MOST_LAYERS)
    StreamingSpec.interleaved(_MOST_LAYERS, 0 if fraction is None else fraction, sink, window, prefill)


def _check_checkpoint(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise ConversionError(f"{checkpoint}: must be the folder of a Hugging Face checkpoint, and isn't a folder")
    config = checkpoint / "config.json"
    if not config.is_file():
        raise ConversionError(f"{checkpoint}: has no config.json, must be the folder of a Hugging Face checkpoint")
    try:
        if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
            raise ValueError("is no JSON object")
    except ValueError as error:
        raise ConversionError(f"{config}: {error}") from None
    if not any(next(checkpoint.glob(pattern), None) for pattern in _WEIGHTS):
        raise ConversionError(f"{checkpoint}: has no weights, must have {' or '.join(_WEIGHTS)}")


def _destination(checkpoint: Path, outfile: str | os.PathLike[str] | None, overwrite: bool) -> tuple[Path, str]:
    """The folder to write into and the file's name in it, empty if upstream is to name it."""
    outfile = checkpoint if outfile is None else Path(outfile)
    if outfile.is_dir():
        return outfile, ""
    if not outfile.parent.is_dir():
        raise ValueError(f"{outfile}: the folder {outfile.parent} doesn't exist")
    if outfile.exists() and not overwrite:
        raise FileExistsError(f"{outfile}: exists, remove it or use --overwrite")
    return outfile.parent, outfile.name


@contextmanager
def _hidden_folder(parent: Path) -> Iterator[Path]:
    """A folder on the same file system as `parent`, gone with all that is in it at the end of the with block."""
    folder = Path(tempfile.mkdtemp(prefix=".converting-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_worker(request: dict[str, Any]) -> None:
    """Runs upstream's converter; raises what it reports.

    The worker lives as long as its stdin is open: if this process dies, it removes the unfinished files and ends too.
    """
    command = [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path)]
    # note: a session of its own, so that Ctrl-C in a terminal reaches this process alone, which then ends the worker
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True) as worker:
        assert worker.stdin and worker.stdout
        try:
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
            answer = worker.stdout.read()
        except BaseException:
            worker.kill()
            raise
    if worker.returncode < 0:
        raise ConversionError(f"the converter was killed by signal {-worker.returncode}, perhaps for want of memory")
    report = json.loads(answer or '{"error": "the converter ended without saying why; --verbose shows its log"}')
    if report["error"]:
        raise ConversionError(report["error"])


def _publish(file: Path, destination: Path) -> Path:
    return file.replace(destination)
