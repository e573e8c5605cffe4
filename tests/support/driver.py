"""Models and contexts as `support.native` has them, in a process of their own: on another processor's code, or under qemu.

LT_TEST_DRIVER is the command that starts it (scripts/checks/cpu/driver.cpp, with what it needs before and behind it);
`support.oracle` then uses it instead of this process's own library. Only what the oracle asks of every processor is here:
reading, decoding, prompts. scripts/checks/cpu_levels.py sets it up.
"""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from support import native
from support.native import KV_TYPES, N_THREADS, DecodeError, Token

COMMAND = "LT_TEST_DRIVER"


class DriverError(RuntimeError):
    """The driver has ended, with what it said last."""


class Driver:
    """The process, and one request at a time."""

    def __init__(self, command: list[str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        atexit.register(self.close)

    def ask(self, request: str) -> list[str]:
        """The words of the answer. Raises ValueError with what the driver refused, DriverError if it ended."""
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(request) from None
        answer = self._process.stdout.readline().decode().rstrip("\n")
        if not answer:
            raise self._ended(request)
        word, _, rest = answer.partition(" ")
        if word != "ok":
            raise ValueError(rest)
        return rest.split()

    def floats(self, n: int) -> np.ndarray:
        content = self._process.stdout.read(4 * n)
        if len(content) < 4 * n:
            raise self._ended("logits")
        return np.frombuffer(content, np.float32)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ended(self, request: str) -> DriverError:
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
        return DriverError(f"the driver ended at {request.split()[0]!r}: {': '.join([how, *last])}")


class Model:
    """A GGUF file, loaded by a driver of its own. Raises ValueError if llama.cpp refuses it."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.driver = Driver(shlex.split(os.environ[COMMAND]))
        self.n_vocab, self.n_layer, self.n_swa = map(int, self.driver.ask(f"load {path}"))

    def set_streaming(self, spec: str | None) -> None:
        self.driver.ask(f"spec {spec or ''}")

    def context(self, **settings) -> Context:
        return Context(self, **settings)

    def close(self) -> None:
        self.driver.close()


class Context(native.Context):
    """A llama_context of the driver, which has one at a time; settings and methods are those of `native.Context`."""

    def __init__(self, model: Model, *, n_ctx: int = 512, kv: str = "f32", flash: bool = False, **settings) -> None:
        self.model, self._driver = model, model.driver
        settings = {"n_batch": n_ctx, "n_ubatch": settings.get("n_batch", n_ctx), "n_threads": N_THREADS} | settings
        settings |= {"type_k": KV_TYPES[kv], "type_v": KV_TYPES[kv], "flash_attn_type": int(flash), "n_ctx": n_ctx}
        self._driver.ask("context " + " ".join(f"{name}={value}" for name, value in settings.items()))
        self.n_batch = settings["n_batch"]

    def decode_batch(self, tokens: Iterable[Token]) -> np.ndarray:
        tokens = list(tokens)
        rows = [np.empty((0, self.model.n_vocab), np.float32)]
        for first in range(0, len(tokens), self.n_batch):
            part = tokens[first : first + self.n_batch]
            words = [f"{token.id} {token.pos} {int(token.logits)} {token.seqs[0]}" for token in part]
            try:
                n_rows = int(self._driver.ask(f"decode {len(part)} {' '.join(words)}")[0])
            except ValueError as error:
                raise DecodeError(int(str(error).split()[0])) from None
            rows.append(self._driver.floats(n_rows * self.model.n_vocab).reshape(n_rows, -1))
        return np.concatenate(rows)

    def in_prompt(self, seq: int = 0) -> bool:
        return self._driver.ask(f"in_prompt {seq}") == ["1"]

    def kv_bytes(self, part: int) -> int:
        return int(self._driver.ask(f"kv_bytes {part}")[0])

    def prompt_begin(self, n_tokens: int, seq: int = 0) -> None:
        self._driver.ask(f"prompt_begin {seq} {n_tokens}")

    def close(self) -> None:  # the driver frees it when it makes another one
        pass
