"""llama-server on a free port of this machine, for tests."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lt_gguf.runtime.library import LibraryError, tool_path


@contextlib.contextmanager
def running(model: Path, streaming: str, log: Path, *options: str, tool: Path | None = None) -> Iterator[str]:
    """A server with one slot, unless options say more, and one thread, and `streaming` as LT_STREAMING; its address."""
    try:
        tool = tool or tool_path("llama-server")
    except LibraryError as error:
        pytest.skip(str(error))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [tool, "--model", model, "--host", "127.0.0.1", "--port", str(port), "--parallel", "1", "--threads", "1"]
    command += ["--cache-ram", "0", "--no-warmup", "--offline", *options]
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"LT_STREAMING": streaming})
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            assert server.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=1):
                break
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=20)
