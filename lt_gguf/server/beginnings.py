"""What a prompt begins with is read once, and kept until the server ends: a document, however its question is edited.

Where streaming layers read a prompt with full attention (`prefill = full`), nobody can go back into it: what they hold of it is dropped
at its end. So its beginning is read apart, with the prompt left open (llama-server's `n_predict = 0`), its state is saved, and
comes back from the disk for another question. To the model it is as if all had been read at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import aiohttp

from lt_gguf.server.llama_server import LlamaServer

FIELD = "lt_read_first"  # of a request: how many characters of its last message are such a beginning
EVENT = "lt_begun"  # of the stream that answers it: what reading that took
DEFAULT_LIMIT = 1 << 30  # bytes on disk, of this server

_LEAST = 256  # tokens; reading fewer takes no longer than restoring them
_PARTS_OF_A_TEMPLATE = ("messages", "tools", "tool_choice", "chat_template_kwargs", "reasoning_format", "add_generation_prompt")


class Beginnings:
    """The beginnings that a server has read.

    Args:
        server: which has one slot, if they are kept.
        keeps: their states are saved; else llama-server alone sees to it that what is read stays.
        limit: most bytes that they take on disk together; those go first that weren't used for longest.
    """

    def __init__(self, server: LlamaServer, keeps: bool = True, limit: int = DEFAULT_LIMIT) -> None:
        self.server = server
        self.keeps = keeps
        self.limit = limit
        self.slot = asyncio.Lock()  # held until the answer is complete, else somebody else's prompt might come in between
        self._kept: OrderedDict[str, int] = OrderedDict()  # name of a file: its bytes

    async def read(self, request: dict[str, Any], n_chars: int) -> AsyncIterator[dict[str, Any]]:
        """Makes a slot hold the first `n_chars` characters of the request's last message, and all that stands before it.

        Yields what llama-server says of its progress, and at the end an event with `EVENT`. Where it can't be done, nothing comes: the
        prompt is then read as a whole.
        """
        tokens = await self._tokens(request, n_chars)
        if len(tokens) < _LEAST:
            return
        name = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:32]
        if name in self._kept and await self._ask("/slots/0?action=restore", {"filename": name}) is not None:
            self._kept.move_to_end(name)
            yield {EVENT: {"prompt_n": 0, "cache_n": len(tokens), "prompt_ms": 0}}
            return
        self._drop(name)
        said = {"prompt": tokens, "n_predict": 0, "cache_prompt": True, "stream": True, "return_progress": True}
        if self.keeps:
            said["id_slot"] = 0
        timings: dict[str, Any] | None = None
        async for event in self._stream("/completion", said):
            timings = event.get("timings", timings)
            if "prompt_progress" in event:
                yield {"prompt_progress": event["prompt_progress"], "choices": []}
        if timings is not None:
            saved = await self._ask("/slots/0?action=save", {"filename": name}) if self.keeps else None
            if saved is not None:
                self._keep(name, int(saved["n_written"]))
            yield {EVENT: {key: timings[key] for key in ("prompt_n", "cache_n", "prompt_ms")}}

    async def _tokens(self, request: dict[str, Any], n_chars: int) -> list[int]:
        """Those that the prompt begins with, none if that can't be told."""
        mark = f"piece-{secrets.token_hex(8)}"  # which nobody can have written
        *before, last = request["messages"]
        begun = {key: request[key] for key in _PARTS_OF_A_TEMPLATE if key in request}
        begun["messages"] = [*before, last | {"content": last["content"][:n_chars] + mark}]
        rendered = await self._ask("/apply-template", begun)
        if rendered is None or mark not in rendered["prompt"]:
            return []
        text = rendered["prompt"].partition(mark)[0]
        counted = await self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return [] if counted is None else counted["tokens"]

    async def _ask(self, path: str, said: dict[str, Any]) -> Any | None:
        assert self.server.session is not None
        with suppress(aiohttp.ClientError, OSError, ValueError):
            async with self.server.session.post(path, json=said) as answer:
                return await answer.json(content_type=None) if answer.status == 200 else None
        return None

    async def _stream(self, path: str, said: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        assert self.server.session is not None
        with suppress(aiohttp.ClientError, OSError, ValueError):
            async with self.server.session.post(path, json=said) as answer:
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        yield json.loads(line[6:])

    def _keep(self, name: str, n_bytes: int) -> None:
        self._kept[name] = n_bytes
        while sum(self._kept.values()) > self.limit:
            self._drop(next(iter(self._kept)))

    def _drop(self, name: str) -> None:
        self._kept.pop(name, None)
        (self.server.states / name).unlink(missing_ok=True)


def beginning_of(body: bytes) -> tuple[dict[str, Any], int] | None:
    """The request without `FIELD`, and what that said; `None` if it says nothing that makes sense for its messages."""
    if FIELD.encode() not in body:
        return None
    try:
        request = json.loads(body)
        n_chars = request.pop(FIELD)
        content = request["messages"][-1]["content"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    is_sane = isinstance(n_chars, int) and isinstance(content, str) and 0 < n_chars <= len(content)
    return (request, n_chars) if is_sane else None
