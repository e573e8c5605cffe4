"""Runs llama-server and the gateway before it until it is stopped."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

from aiohttp import web

from lt_gguf.server.gateway import GatewaySettings, make_app
from lt_gguf.server.llama_server import LlamaServer, ServerSettings

_GRACE = 1.0  # seconds that answers in the middle have at the end; aiohttp takes them twice


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 is a free one.

    Raises:
        OSError: it can't be had, one line.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"--host = {host}: {error.strerror or error}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise OSError(f"{host}:{port}: {error.strerror or error}: name another --port, or 0 for a free one") from None
    return listening


async def serve(
    settings: ServerSettings,
    gateway: GatewaySettings,
    listening: socket.socket,
    say: Callable[[str], None],
    log: Callable[[str], None] | None = None,
    when_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        listening: where; it is closed at the end.
        say: gets what a person should know, a line at a time.
        log: gets llama-server's log.
        when_ready: called once the model has been loaded and requests are answered.

    Raises:
        ServerDiedError: llama-server can't be started, or dies again and again.
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    stopping = asyncio.create_task(stopped.wait())
    async with LlamaServer(settings, say, log) as server:
        # note: before the model is there, too: who asks early is told so
        runner = web.AppRunner(make_app(server, gateway), handler_cancellation=True, access_log=None, shutdown_timeout=_GRACE)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        try:
            running = asyncio.create_task(_run(server, when_ready))
            await asyncio.wait({stopping, running}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            running.cancel()
        finally:
            stopping.cancel()
            await runner.cleanup()


async def _run(server: LlamaServer, when_ready: Callable[[], None]) -> None:
    await server.start()
    when_ready()
    await server.watch()
