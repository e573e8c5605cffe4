"""`LlamaServer`: the patched llama-server as a child, which ends with this process and is started again if it dies."""

from __future__ import annotations

import asyncio
import os
import re
import time
from asyncio import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp

from lt_gguf.gguf.unfinished import unfinished_folder
from lt_gguf.models.package import user_cache
from lt_gguf.runtime import supervised
from lt_gguf.runtime.crash import describe_death
from lt_gguf.runtime.library import tool_path
from lt_gguf.spec import CacheTypes
from lt_gguf.spec.cache_types import PLAIN

# A child that dies so often within so many seconds isn't started again.
MOST_DEATHS, WITHIN = 3, 120.0

# Seconds between attempts to reach another machine that computes for it; the last one again and again.
_WAITS = (1, 2, 5, 10, 30)

_N_LINES = 40  # of its log, to say why it died
_ERROR = re.compile(r"\berror\b|failed|fatal|assert|unable|invalid", re.IGNORECASE)
_LOST = re.compile(
    r"ggml-rpc|(send|recv) failed|Remote RPC server"
)  # upstream's ggml-rpc.cpp, when a server of --rpc doesn't answer
_STAMP = re.compile(r"^(\d+\.\d+\.\d+\.\d+ )?[IWEDF] ")  # time and level of a line of its log


class ServerDiedError(RuntimeError):
    """llama-server has ended by itself; one line with its reason."""


class MachineLostError(ServerDiedError):
    """It has ended because a machine that computes for it doesn't answer."""


@dataclass(frozen=True)
class ServerSettings:
    """What llama-server runs with.

    Args:
        model: the GGUF file.
        n_ctx: context of all slots together, in tokens.
        n_slots: conversations at a time.
        streaming: the spec's text, as LT_STREAMING takes it; `None`: what the file says.
        prompt_limit: most bytes that a long prompt may take besides the cache; 0: no limit.
        cache_types: of K and V in the KV cache.
        n_threads: CPU threads.
        n_gpu_layers: layers on the GPU; -1: all.
        n_batch: tokens of a prompt that are read at once.
        flash_attn: whether flash attention is used.
        saves_slot: it may save what its slot holds, in a folder of ours.
        more: further options of llama-server's own.
    """

    model: str
    n_ctx: int
    n_slots: int = 1
    streaming: str | None = None
    prompt_limit: int = 0
    cache_types: CacheTypes = PLAIN
    n_threads: int = 1
    n_gpu_layers: int = -1
    n_batch: int = 512
    flash_attn: bool = True
    saves_slot: bool = False
    more: Sequence[str] = ()

    def command(self, address: Path, states: Path) -> list[str]:
        """llama-server's command line: it listens on the socket `address` and saves its slots in the folder `states`.

        Raises:
            LibraryError: it isn't there.
        """
        gpu_layers = "all" if self.n_gpu_layers < 0 else str(self.n_gpu_layers)
        return [
            str(tool_path("llama-server")),
            *("--model", self.model, "--host", str(address), "--no-ui", "--offline", "--metrics", "--slots"),
            *(("--slot-save-path", str(states)) if self.saves_slot else ()),
            *("--ctx-size", str(self.n_ctx), "--parallel", str(self.n_slots), "--fit", "off"),
            *("--cache-type-k", self.cache_types.k, "--cache-type-v", self.cache_types.v),
            *("--threads", str(self.n_threads), "--n-gpu-layers", gpu_layers, "--batch-size", str(self.n_batch)),
            *("--flash-attn", "on" if self.flash_attn else "off"),
            *self.more,
        ]

    def environment(self) -> dict[str, str]:
        environment = {"LT_ATTENTION": "on"} | dict(os.environ)
        if self.streaming is not None:
            environment["LT_STREAMING"] = self.streaming
        if self.prompt_limit:
            environment["LT_PROMPT_LIMIT"] = str(max(1, self.prompt_limit >> 20))
        return environment


@dataclass
class LlamaServer:
    """The child, reached through a socket in a folder that is this user's alone.

    Args:
        settings: what it runs with.
        say: gets a line when it dies and when it is there again.
        log: gets each line of its log; `None`: nobody.

    Attributes:
        states: folder of what it saves of its slots; gone with this object.
        is_ready: it has loaded the model, and answers.
        was_ready: it had, before it ended.
        away: what it does while it isn't ready.
    """

    settings: ServerSettings
    say: Callable[[str], None] = print
    log: Callable[[str], None] | None = None
    is_ready: bool = field(default=False, init=False)
    was_ready: bool = field(default=False, init=False)
    away: str = field(default="it is being loaded", init=False)

    def __post_init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="lt-gguf-")
        self.address = Path(self._folder.name) / "llama.sock"
        self._stack = ExitStack()
        self.states = Path()
        self._lines: deque[str] = deque(maxlen=_N_LINES)
        self._process: subprocess.Process | None = None
        self.session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> LlamaServer:
        # note: not beside the socket, as temporary folders often lie in memory
        cache = user_cache()
        cache.mkdir(parents=True, exist_ok=True)
        self.states = self._stack.enter_context(unfinished_folder(cache, ".serve-"))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        # note: llama-server closes connections after streams, and a request on one that is about to be closed would be lost
        connector = aiohttp.UnixConnector(str(self.address), limit=0, force_close=True)
        self.session = aiohttp.ClientSession("http://llama-server", connector=connector, timeout=timeout, auto_decompress=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()
        if self.session is not None:
            await self.session.close()
        self._stack.close()
        self._folder.cleanup()

    async def start(self) -> None:
        """Starts it and waits until it answers. Raises ServerDiedError, MachineLostError: it ends before that."""
        self.address.unlink(missing_ok=True)
        self._lines.clear()
        self.was_ready = False
        self._process = await subprocess.create_subprocess_exec(
            *supervised.ending_with_stdin(self.settings.command(self.address, self.states)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.settings.environment(),
            # note: Ctrl-C in a terminal reaches this process alone, which then ends it
            start_new_session=True,
            limit=1 << 20,
        )
        reading = asyncio.create_task(self._read_log(self._process))
        while not await self._answers():
            if self._process.returncode is not None:
                await reading
                raise self._death()
            await asyncio.sleep(0.1)
        self.is_ready = self.was_ready = True
        self.away = "it is being loaded again"

    async def watch(self) -> None:
        """Waits for its death, says why it died, and starts it again. Raises ServerDiedError: it dies again and again, for reasons of
        its own; or it can't be started any more."""
        deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        while True:
            assert self._process is not None
            await self._process.wait()
            self.is_ready = False
            death = self._death()
            if not isinstance(death, MachineLostError):
                deaths.append(time.monotonic())
                if len(deaths) == MOST_DEATHS and deaths[-1] - deaths[0] < WITHIN:
                    raise ServerDiedError(f"{death}; that was the {MOST_DEATHS}rd time within {WITHIN:.0f} s")
            self.say(f"{death}; it is started again")
            await self._start_again()
            self.say("llama-server answers again")

    async def _start_again(self) -> None:
        """Starts it, as soon as the machines are there that compute for it. Raises ServerDiedError."""
        for wait in chain(_WAITS, repeat(_WAITS[-1])):
            try:
                await self.start()
            except MachineLostError as error:
                self.say(f"{error}; it is tried again in {wait} s")
                self.away = "a machine that computes for it doesn't answer"
                await asyncio.sleep(wait)
            else:
                return

    async def _answers(self) -> bool:
        assert self.session is not None
        try:
            async with self.session.get("/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    async def _read_log(self, process: subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            text = line.decode(errors="replace").rstrip()
            if text:
                self._lines.append(text)
                if self.log is not None:
                    self.log(text)
        await process.wait()

    def _death(self) -> ServerDiedError:
        """Why it ended, as far as its log and its exit status say."""
        assert self._process is not None
        status = self._process.returncode or 0
        number = supervised.signal_of(status)
        doing = "answering" if self.was_ready else "loading the model"
        lost = next((line for line in self._lines if _LOST.search(line)), None)
        if lost is not None and "--rpc" in self.settings.more:
            machines = self.settings.more[self.settings.more.index("--rpc") + 1]
            said = re.sub(r".*ggml-rpc\.cpp:\d+: ", "", _STAMP.sub("", lost))
            return MachineLostError(f"llama-server has lost a machine of --rpc {machines} while {doing}: {said}")
        how = describe_death("llama-server", doing, number) if number else f"llama-server ended with status {status} while {doing}"
        complaint = next((line for line in self._lines if _ERROR.search(line)), None)
        return ServerDiedError(how if complaint is None else f"{how}: {_STAMP.sub('', complaint)}")

    async def _end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            await self._process.wait()
