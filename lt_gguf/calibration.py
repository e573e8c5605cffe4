"""Calibration texts: what lazy ratios are measured on.

A text is read, or is that of the running Python, and is cut into prompts of equal length.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_SAMPLES = 8
DEFAULT_LENGTH = 4096  # the paper's; four times sink + window, so that a layer has something to look at besides
DEFAULT_FIELD = "text"

_ENOUGH = 2_400_000  # characters of the built-in texts: 8 samples of 32,768 tokens of up to 9 characters
_LEAST = 2_000_000
_BETWEEN = "\n\n"  # documents
_CHARS_PER_TOKEN = 8  # of a first try, more than prose and source have


@dataclass(frozen=True)
class Texts:
    """What samples are cut out of.

    Args:
        name: of the file, without its folder.
        sha256: of the file, or of the built-in documents.
        documents: at least one.
    """

    name: str
    sha256: str
    documents: tuple[str, ...]

    def halves(self) -> tuple[Texts, Texts]:
        """Two parts that have nothing in common: every other document, or the first and the second half of a single one."""
        documents = [document for document in self.documents if document.strip()]
        if len(documents) > 1:
            parts: tuple[Sequence[str], Sequence[str]] = documents[::2], documents[1::2]
        else:
            middle = len(documents[0]) // 2
            parts = [documents[0][:middle]], [documents[0][middle:]]
        return Texts(self.name, self.sha256, tuple(parts[0])), Texts(self.name, self.sha256, tuple(parts[1]))


@dataclass(frozen=True)
class Calibration:
    """The text that lazy ratios were measured on.

    Args:
        data: name of the text.
        sha256: of its bytes.
        samples: number of prompts that were cut out of it.
        length: tokens of each.
    """

    data: str
    sha256: str
    samples: int
    length: int

    def describe(self, sink: int, window: int, w_last: int) -> dict[str, Any]:
        """As in a GGUF file's `lighttransfer.calibration`."""
        return {
            "data": self.data,
            "sha256": self.sha256,
            "samples": self.samples,
            "length": self.length,
            "tokens": self.samples * self.length,
            "w_last": w_last,
            "w_sink": sink,
            "w_recent": window,
        }


def read_texts(path: Path | None, field: str = DEFAULT_FIELD) -> Texts:
    """Reads calibration texts.

    Args:
        path: `.jsonl`: a JSON object a line; else plain text, one document; `None`: the texts of the running Python.
        field: of each JSON object: a string, or a conversation, a list of messages with `role` and `content`.

    Raises:
        ValueError: the file isn't UTF-8, is empty, or a line of it isn't what it must be; the message names the line.
        OSError: it can't be read.
    """
    if path is None:
        return _built_in_texts()
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8, see byte {error.start}") from None
    documents: tuple[str, ...] = (text,)
    if path.suffix.lower() == ".jsonl":
        # note: not splitlines(), which also splits at characters that JSON strings may hold
        lines = enumerate(text.split("\n"), 1)
        documents = tuple(_document(line, field, f"{path}: line {number}") for number, line in lines if line.strip())
    if not any(document.strip() for document in documents):
        raise ValueError(f"{path}: has no text, must be like what the model will read, a few hundred kilobytes of it")
    return Texts(path.name, hashlib.sha256(data).hexdigest(), documents)


def cut_samples(
    texts: Texts, tokenize: Callable[[str], Sequence[int]], bos: Sequence[int], samples: int, length: int
) -> list[list[int]]:
    """Prompts of equal length, spread evenly over the texts.

    Args:
        tokenize: gives the tokens of a text, none added.
        bos: the tokens that every prompt begins with.
        samples: number of prompts.
        length: tokens of each, `bos` included.

    Raises:
        ValueError: a number is out of range, or there is too little text.
    """
    if samples < 1:
        raise ValueError(f"samples = {samples}: must be at least 1")
    n_tokens = length - len(bos)
    if n_tokens < 1:
        raise ValueError(f"calibration length = {length}: must be at least {len(bos) + 1}")
    text = _BETWEEN.join(texts.documents)
    stride = len(text) // samples
    prompts = []
    for i in range(samples):
        tokens = _first_tokens(text[i * stride : (i + 1) * stride], tokenize, n_tokens)
        if len(tokens) < n_tokens:
            raise ValueError(
                f"{texts.name}: part {i + 1} of {samples} has {len(tokens)} tokens, must have {n_tokens} for samples of "
                f"{length}: give a longer text, fewer samples or a shorter length"
            )
        prompts.append([*bos, *tokens])
    return prompts


def check_length(length: int, sink: int, window: int) -> None:
    """Raises ValueError if no prompt of `length` tokens can tell layers apart."""
    if length <= sink + window:
        raise ValueError(
            f"calibration length = {length}: must be more than sink + window = {sink + window}, else every lazy ratio is 1"
        )


def _first_tokens(text: str, tokenize: Callable[[str], Sequence[int]], n: int) -> list[int]:
    """The first `n` tokens of a text, fewer if it has no more; reads only as much of it as that takes."""
    n_chars = n * _CHARS_PER_TOKEN
    while True:
        tokens = tokenize(text[:n_chars])
        if len(tokens) > n or n_chars >= len(text):
            return list(tokens[:n])
        n_chars *= 2


def _document(line: str, field: str, where: str) -> str:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: is no JSON ({error}), must be an object a line") from None
    if not isinstance(content, dict) or field not in content:
        has = f"has only {', '.join(map(str, content))}" if isinstance(content, dict) and content else "has no fields"
        raise ValueError(f'{where}: {has}, must be an object with "{field}", or --calibration-field must name another')
    value = content[field]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return "\n".join(f"{message['role']}: {message['content']}" for message in value)
    raise ValueError(f'{where}: "{field}" must be a string, or a list of messages with the strings "role" and "content"')


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _built_in_texts() -> Texts:
    """Python's language reference, then the source of its standard library: prose and code that every machine has.

    They are free to use (PSF licence), and the same for all installations of one Python release.
    """
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    n_chars = sum(map(len, documents))
    # note: a module with an underscore may be made for one machine, as _sysconfigdata is
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        if n_chars >= _ENOUGH:
            break
        source = path.read_text(encoding="utf-8", errors="replace")
        documents.append(source)
        n_chars += len(source)
    if n_chars < _LEAST:
        raise ValueError(
            f"the texts of this Python have {n_chars} characters, too few to measure on: give --calibration FILE, "
            "a text like what the model will read"
        )
    sha256 = hashlib.sha256(_BETWEEN.join(documents).encode()).hexdigest()
    return Texts(f"texts of Python {platform.python_version()}", sha256, tuple(documents))
