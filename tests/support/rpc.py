"""llama.cpp's RPC servers on this machine, which stand in for other machines or devices."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from lt_gguf.runtime.library import LibraryError, tool_path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(port: int) -> subprocess.Popen:
    """One of them, when it answers."""
    try:
        tool = tool_path("rpc-server")
    except LibraryError as error:
        pytest.skip(str(error))
    command = [tool, "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.1)
    return process


@contextlib.contextmanager
def rpc_servers(n: int) -> Iterator[tuple[list[str], list[subprocess.Popen]]]:
    """The endpoints of `n` servers on free ports, and their processes, which may be replaced by others."""
    ports = [free_port() for _ in range(n)]
    processes = [start(port) for port in ports]
    try:
        yield [f"127.0.0.1:{port}" for port in ports], processes
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=10)
