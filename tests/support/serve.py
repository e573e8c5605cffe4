"""`lt-gguf serve` in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import psutil
import pytest

from lt_gguf.runtime.library import LibraryError, tool_path


class Served:
    """A running `lt-gguf serve`."""

    def __init__(self, process: subprocess.Popen, address: str) -> None:
        self.process, self.address = process, address

    def ask(self, path: str, said: object = None, headers: dict[str, str] | None = None, timeout: float = 60) -> bytes:
        data = said if isinstance(said, bytes) or said is None else json.dumps(said).encode()
        with urllib.request.urlopen(urllib.request.Request(self.address + path, data, headers or {}), timeout=timeout) as answer:
            return answer.read()

    def chat(self, content: str, **settings: object) -> dict:
        said = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 5,
            "temperature": 0,
            "ignore_eos": True,
        } | settings
        return json.loads(self.ask("/v1/chat/completions", said))

    def child(self) -> psutil.Process:
        """llama-server itself."""
        return next(child for child in psutil.Process(self.process.pid).children(recursive=True) if child.name() == "llama-server")

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """The exit status, and what was said."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


def start(*options: object, environment: dict[str, str] | None = None) -> subprocess.Popen:
    try:
        tool_path("llama-server")
    except LibraryError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-c", "from lt_gguf.cli import main; main()", "serve", *map(str, options)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
        start_new_session=True,
    )


@contextlib.contextmanager
def serving(*options: object, **settings) -> Iterator[Served]:
    process = start(*options, **settings)
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://"), process.communicate()[1]
        yield Served(process, address)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
