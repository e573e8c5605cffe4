"""What browsers and programs reach: the page, documents as text, and everything that llama-server answers, passed on as it is.

Only who has the key, where there is one, is let in; without a key only programs and the page itself, not what other web pages
send from a browser on the same computer.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import mimetypes
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from lt_gguf.documents import DocumentError, read_bytes
from lt_gguf.server.beginnings import FIELD, Beginnings, beginning_of
from lt_gguf.server.llama_server import LlamaServer

PAGE = Path(__file__).parent / "page"
MOST_BYTES = 64 << 20  # of a document or a request

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# about the connection and not about what is sent (RFC 9110, section 7.6.1), and what is made anew on the way
_OF_A_CONNECTION = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade host content-length".split()
)
_PAGE_HEADERS = {
    # what a model writes may be anybody's: nothing is loaded from elsewhere, and no script but ours runs
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_STREAM_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class GatewaySettings:
    """Who is let in, and what the page is told.

    Args:
        info: what `GET /lt/info` answers.
        api_key: what a request must bring, as `Authorization: Bearer KEY`; `None`: nothing.
        origins: of web pages that may ask beside the server's own, as in http://localhost:3000; "*": all.
        keeps_beginnings: there is one slot, and streaming layers that drop what they read of a prompt: `Beginnings` are of use.
        reads_ahead: no layer streams: what a prompt begins with may be read before the rest of it is there, in any slot.
        is_local: it listens on this computer alone, so without a key a request that came by another name is none of its own.
    """

    info: Mapping[str, Any]
    api_key: str | None = None
    origins: Sequence[str] = ()
    is_local: bool = True
    keeps_beginnings: bool = False
    reads_ahead: bool = False


def make_app(server: LlamaServer, settings: GatewaySettings) -> web.Application:
    """The application that answers for a server; to be run with `handler_cancellation`, so that a client that leaves is noticed."""
    gateway = _Gateway(server, settings)
    app = web.Application(middlewares=[gateway.guard], client_max_size=MOST_BYTES)
    app.router.add_get("/lt/info", gateway.info)
    app.router.add_post("/lt/document", gateway.document)
    app.router.add_post("/lt/tokens", gateway.tokens)
    app.router.add_post("/lt/read", gateway.read)
    app.router.add_route("*", "/{path:.*}", gateway.page_or_llama_server)
    return app


def error(status: int, message: str, kind: str = "invalid_request_error") -> web.Response:
    """An error in the form that OpenAI's and llama-server's have."""
    said = {"error": {"code": status, "message": message, "type": kind}}
    return web.json_response(said, status=status)


class _Gateway:
    def __init__(self, server: LlamaServer, settings: GatewaySettings) -> None:
        self.server = server
        self.settings = settings
        self.beginnings = Beginnings(server) if settings.keeps_beginnings else None
        self.ahead = self.beginnings or (Beginnings(server, keeps=False) if settings.reads_ahead else None)
        self._files = {f"/{path.relative_to(PAGE).as_posix()}": path for path in PAGE.rglob("*") if path.is_file()}
        if "/index.html" in self._files:
            self._files["/"] = self._files["/index.html"]

    # ------------------------------------------------------------------------------------- who is let in

    @web.middleware
    async def guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Refuses who isn't let in, and lets web pages of other origins see answers where they may."""
        origin = request.headers.get("Origin")
        is_public = request.path in ("/health", "/v1/health") or (request.method == "GET" and request.path in self._files)
        if refused := self._refused(request, origin, is_public):
            return refused
        if request.method == "OPTIONS" and origin is not None:
            response: web.StreamResponse = web.Response(status=204)
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
            response.headers["Access-Control-Allow-Headers"] = request.headers.get("Access-Control-Request-Headers", "*")
        else:
            try:
                response = await handler(request)
            except web.HTTPRequestEntityTooLarge:
                response = error(413, f"it has more than {MOST_BYTES >> 20} MiB")
            except web.HTTPException as refused_by_aiohttp:
                response = error(refused_by_aiohttp.status, refused_by_aiohttp.reason)
        if origin is not None and not response.prepared:
            _allow(response.headers, origin)
        return response

    def _refused(self, request: web.Request, origin: str | None, is_public: bool) -> web.Response | None:
        is_open = self.settings.is_local and self.settings.api_key is None
        if is_open and _split(f"//{request.host}").hostname not in _LOCAL_NAMES:
            # note: the name of another site may be made to mean this computer, and its pages would then be of this origin
            return error(403, f"{request.host}: isn't this server, which is reached as localhost")
        if origin is not None and not self._may_ask(request, origin):
            return error(403, f"{origin}: pages from there may not ask this server (--allow-origin lets them)")
        if self.settings.api_key is None or is_public or request.method == "OPTIONS":
            return None
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        key = request.headers.get("X-Api-Key", "") if kind.lower() != "bearer" else key.strip()
        if hmac.compare_digest(key.encode(errors="surrogateescape"), self.settings.api_key.encode(errors="surrogateescape")):
            return None
        return error(401, "the API key is missing or wrong: Authorization: Bearer KEY", "authentication_error")

    def _may_ask(self, request: web.Request, origin: str) -> bool:
        return _split(origin).netloc == request.host or "*" in self.settings.origins or origin in self.settings.origins

    # ------------------------------------------------------------------------------------ our own answers

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response(dict(self.settings.info))

    async def document(self, request: web.Request) -> web.Response:
        """The text of a file that is sent, and its tokens."""
        name = Path(unquote(request.headers.get("X-Filename", ""))).name or "document"
        data = await request.read()
        try:
            found = await asyncio.to_thread(read_bytes, data, name)
        except DocumentError as problem:
            return error(415, str(problem))
        counted = await self._ask("/tokenize", {"content": found.text})
        if isinstance(counted, web.Response):
            return counted
        described = f"{found.describe()}{f': {found.note}' if found.note else ''}"
        said = {"name": found.name, "text": found.text, "description": described, "n_tokens": len(counted["tokens"])}
        return web.json_response(said)

    async def tokens(self, request: web.Request) -> web.Response:
        """How many tokens messages are, as the model's chat template makes a prompt of them."""
        try:
            messages = (await request.json())["messages"]
        except (ValueError, KeyError, TypeError):
            return error(400, 'must be JSON with "messages"')
        counted = await self._ask("/v1/chat/completions/input_tokens", {"messages": messages})
        return counted if isinstance(counted, web.Response) else web.json_response({"n_tokens": counted["input_tokens"]})

    async def read(self, request: web.Request) -> web.StreamResponse:
        """Reads what a prompt begins with before its question is there: a stream of progress, nothing (204) where that is of no use."""
        found = beginning_of(await request.read())
        if found is None:
            return error(400, f'must be JSON with "messages", and "{FIELD}", characters of the last of them')
        if self.ahead is None:
            return web.Response(status=204)
        if not self.server.is_ready:
            return self._away()
        response = await self._begin(request, web.StreamResponse(headers=_STREAM_HEADERS))
        async with self.ahead.slot:
            async for event in self.ahead.read(*found):
                await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _ask(self, path: str, said: dict[str, Any]) -> Any | web.Response:
        """llama-server's answer in JSON, or a response that says why there is none."""
        assert self.server.session is not None
        try:
            async with self.server.session.post(path, json=said) as answer:
                body = await answer.read()
                if answer.status != 200:
                    return web.Response(body=body, status=answer.status, content_type="application/json")
                return json.loads(body)
        except (aiohttp.ClientError, OSError, ValueError):
            return self._away()

    async def page_or_llama_server(self, request: web.Request) -> web.StreamResponse:
        file = self._files.get(request.path) if request.method in ("GET", "HEAD") else None
        if file is None:
            return await self._pass_on(request)
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        return web.Response(body=file.read_bytes(), content_type=kind, headers=_PAGE_HEADERS)

    # ------------------------------------------------------------------------------------------ passing on

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        """llama-server's answer, piece by piece as it comes. Where the client leaves, llama-server learns of it and stops."""
        if not self.server.is_ready:
            return self._away()
        if (
            self.beginnings is not None
            and request.path.startswith("/slots/")
            and request.query.get("action") in ("save", "restore")
        ):
            return error(
                403, "the slot is saved and restored by this server itself (-- --slot-save-path DIR leaves that to others)"
            )
        body = await request.read() if request.can_read_body else None
        found = None if self.beginnings is None or not request.path.endswith("/chat/completions") else beginning_of(body or b"")
        if self.beginnings is None or found is None:
            return await self._relay(request, body)
        said, n_chars = found
        async with self.beginnings.slot:
            response = None
            async for event in self.beginnings.read(said, n_chars):
                if said.get("stream"):
                    response = response or await self._begin(request, web.StreamResponse(headers=_STREAM_HEADERS))
                    await response.write(f"data: {json.dumps(event)}\n\n".encode())
            return await self._relay(request, json.dumps(said | {"id_slot": 0}).encode(), response)

    async def _relay(
        self, request: web.Request, body: bytes | None, response: web.StreamResponse | None = None
    ) -> web.StreamResponse:
        """Passes one request on. `response`: a stream that has begun, and goes on with the answer."""
        assert self.server.session is not None
        path, headers = request.rel_url.raw_path_qs, _headers(request.headers)
        try:
            async with self.server.session.request(
                request.method, path, headers=headers, data=body, allow_redirects=False
            ) as answer:
                if response is not None and answer.status != 200:
                    await response.write(b"data: " + (await answer.read()) + b"\n\n")
                    await response.write_eof()
                    return response
                if response is None:
                    made = web.StreamResponse(status=answer.status, reason=answer.reason, headers=_headers(answer.headers))
                    response = await self._begin(request, made)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response
        except (aiohttp.ClientError, OSError):
            if response is None:
                return self._away()
            # note: the status is sent, so an answer that ends in the middle must not look like a whole one
            if request.transport is not None:
                request.transport.close()
            return response

    async def _begin(self, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
        if (origin := request.headers.get("Origin")) is not None:
            _allow(response.headers, origin)
        await response.prepare(request)
        return response

    def _away(self) -> web.Response:
        return error(503, f"the model isn't there at the moment: {self.server.away}, try it in a few seconds", "unavailable_error")


def _split(address: str) -> SplitResult:
    """The parts of an address, all empty if it is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Those that are passed on: neither about the connection, nor a key that is for us, nor what llama-server says of origins."""
    kept = CIMultiDict[str]()
    for name, value in headers.items():
        is_ours = name.lower() in ("authorization", "x-api-key", "origin") or name.lower().startswith("access-control-")
        if name.lower() not in _OF_A_CONNECTION and not is_ours:
            kept.add(name, value)
    return kept


def _allow(headers: CIMultiDict[str], origin: str) -> None:
    headers["Access-Control-Allow-Origin"] = origin
    headers["Vary"] = "Origin"
