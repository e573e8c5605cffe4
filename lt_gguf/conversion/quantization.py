"""Quantizes a GGUF file with llama.cpp's `llama-quantize`, which keeps all metadata, ours included."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

from lt_gguf.runtime import supervised
from lt_gguf.runtime.cpu import usable_cores
from lt_gguf.runtime.crash import describe_death
from lt_gguf.runtime.library import tool_path

Progress = Callable[[int, int], None]  # tensors done, of how many

# llama-quantize would say so only when the file is there to be quantized (`tensor_requires_imatrix` in llama-quant.cpp).
_NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "Q2_K_S")


@cache
def types() -> tuple[str, ...]:
    """The types that this build's `llama-quantize` knows, as its help lists them. Raises ValueError: it crashed."""
    command: list[str | Path] = [tool_path("llama-quantize"), "--help"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    _check_alive(result.returncode, "showing its help")
    listed = result.stdout.partition("allowed quantization types")[2]
    return tuple(re.findall(r"^\s*(?:\d+\s+or\s+)?([A-Z]\w*)\s*:\s", listed, re.MULTILINE))


def check(type_name: str, imatrix: Path | None) -> str:
    """The type as `llama-quantize` writes it.

    Raises:
        ValueError: there is no such type, or it needs an importance matrix.
        OSError: the importance matrix can't be read.
    """
    name = type_name.upper()
    if name not in types():
        raise ValueError(f'quantize = "{type_name}": must be one of {", ".join(types())}')
    if name in _NEED_IMATRIX and imatrix is None:
        raise ValueError(f"quantize = {name}: needs an importance matrix, add --imatrix FILE (llama-imatrix makes one)")
    if imatrix is not None:
        _check_imatrix(imatrix)
    return name


def _check_imatrix(file: Path) -> None:
    """Lets llama-quantize read the importance matrix, which it does before it looks for the model: here there is none."""
    file.open("rb").close()
    command: list[str | Path] = [tool_path("llama-quantize"), "--imatrix", file.name, "--dry-run", os.devnull, "Q8_0"]
    cwd = file.absolute().parent
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", cwd=cwd)
    _check_alive(result.returncode, f"reading {file}")
    if complaints := [line for line in result.stderr.splitlines() if "imatrix" in line]:
        raise ValueError(f"{file}: is no importance matrix (llama-quantize: {complaints[-1].strip()})")


def _check_alive(status: int, doing: str) -> None:
    if number := supervised.signal_of(status):
        raise ValueError(describe_death("llama-quantize", doing, number))


def least_bytes(type_name: str, n_elements: int) -> int:
    """At least so many bytes have `n_elements` weights of that type; a lower bound that its name tells."""
    digits = re.search(r"\d+", type_name)
    return n_elements * int(digits[0]) // 8 if digits else 0


def quantize(
    source: Path,
    destination: Path,
    type_name: str,
    imatrix: Path | None = None,
    is_split: bool = False,
    progress: Progress = lambda done, total: None,
) -> None:
    """Quantizes the model at `source`.

    Args:
        source: its first file, if it is split.
        destination: file to write; of a split model the name that the parts' names begin with.
        imatrix: importance matrix.
        is_split: write as many parts as `source` has.

    Raises:
        ValueError: it can't be quantized so; one line.
        OSError: the disk is full.
    """
    arguments = ["--keep-split"] if is_split else []
    if imatrix is not None:
        # note: llama-quantize writes down the path as it is given, and ours is nobody's business
        arguments += ["--imatrix", imatrix.name]
    files = [str(source.absolute()), str(destination.absolute())]
    command = [str(tool_path("llama-quantize")), *arguments, *files, type_name, str(usable_cores())]
    cwd = source.parent if imatrix is None else imatrix.absolute().parent
    log: list[str] = []
    with supervised.start(command, cwd) as process:
        assert process.stdin and process.stdout
        try:
            for line in process.stdout:
                if step := re.match(r"\[\s*(\d+)/\s*(\d+)\]", line):
                    progress(int(step[1]), int(step[2]))
                elif line.strip():
                    log.append(line.strip())
        except BaseException:
            process.stdin.close()  # ends it
            raise
    if process.returncode:
        raise _error(process.returncode, log)


def _error(status: int, log: list[str]) -> ValueError | OSError:
    """What llama-quantize reports, in one line."""
    number = supervised.signal_of(status)
    failures = [found[1] for line in log if (found := re.search(r"failed to quantize: (.+)", line))]
    if number == signal.SIGXFSZ or (failures and "iostream" in failures[0]):
        return OSError("the disk is full, or the file is larger than allowed")
    if number:
        return ValueError(describe_death("llama-quantize", "quantizing", number))
    if failures and "validation failed" in failures[0]:
        details = " ".join(line for line in log if "found " in line)
        return ValueError(f"llama-quantize: {failures[0]}: the weights hold NaN or infinity ({details})")
    return ValueError(f"llama-quantize: {(failures or log or ['ended without saying why'])[-1]}")
