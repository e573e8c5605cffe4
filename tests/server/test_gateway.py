"""The gateway before llama-server: who is let in, what is passed on, documents. A stand-in plays llama-server."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from support.document_files import pdf

from lt_gguf.server import gateway as module
from lt_gguf.server.beginnings import Beginnings
from lt_gguf.server.gateway import GatewaySettings, make_app

INFO = {"model": "a model", "n_ctx": 512}
KEY = {"Authorization": "Bearer right"}


class StandIn:
    """Plays llama-server: echoes, counts words as tokens, and notes whose answers were cut off."""

    def __init__(self) -> None:
        self.left: list[str] = []
        self.app = web.Application(client_max_size=1 << 30)
        self.app.router.add_post("/tokenize", self.tokenize)
        self.app.router.add_post("/v1/chat/completions/input_tokens", self.count)
        self.app.router.add_get("/stream", self.stream)
        self.app.router.add_get("/halves", self.halves)
        self.app.router.add_route("*", "/{path:.*}", self.echo)

    async def tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": [zlib.crc32(word.encode()) for word in (await request.json())["content"].split()]})

    async def count(self, request: web.Request) -> web.Response:
        messages = (await request.json())["messages"]
        if not messages:
            return web.json_response({"error": {"code": 400, "message": "no messages"}}, status=400)
        return web.json_response({"input_tokens": sum(len(message["content"].split()) for message in messages)})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await response.write(b'data: {"prompt_progress": {}}\n\n')
            while True:  # silent, as while a long prompt is read
                await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            self.left.append(request.path)
            raise
        return response

    async def halves(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half of ")
        assert request.transport is not None
        request.transport.abort()
        return response

    async def echo(self, request: web.Request) -> web.Response:
        said = {
            "method": request.method,
            "path": request.raw_path,
            "headers": dict(request.headers),
            "body": (await request.read()).decode(),
        }
        return web.json_response(
            said, status=418 if request.path == "/teapot" else 200, headers={"X-Own": "yes", "Access-Control-Allow-Origin": "*"}
        )


class StandInWithSlot(StandIn):
    """Has one slot, whose states are named after what it holds."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.asked, self.read, self.refuses, self.hangs = folder, [], [], False, False

    async def echo(self, request: web.Request) -> web.StreamResponse:
        said = await request.json()
        self.asked.append(request.path_qs)
        if request.path == "/apply-template":
            return web.json_response({"prompt": f"<bos>{said['messages'][-1]['content']}<end>"})
        if request.path == "/completion":
            if self.refuses:
                return web.json_response({"error": {"message": "too long"}}, status=400)
            if self.hangs:
                return await self.stream(request)
            self.read.append({key: said[key] for key in ("id_slot",) if key in said})
            n = len(said["prompt"])
            events = [{"prompt_progress": {"total": n, "processed": n, "cache": 0, "time_ms": 1}}]
            events += [{"stop": True, "timings": {"prompt_n": n, "cache_n": 0, "prompt_ms": 2.5, "predicted_n": 0}}]
            return web.Response(
                text="".join(f"data: {json.dumps(event)}\n\n" for event in events), content_type="text/event-stream"
            )
        if request.path.startswith("/slots/"):
            path = self.folder / said["filename"]
            if request.query["action"] == "save":
                path.write_bytes(b"x" * 1000)
            elif not path.exists():
                return web.json_response({"error": {"message": "none"}}, status=400)
            return web.json_response({"n_written": 1000})
        return web.Response(text=f"data: {json.dumps({'said': said})}\n\ndata: [DONE]\n\n", content_type="text/event-stream")


def talk(check: Callable[[TestClient, Any], Awaitable[None]], is_ready: bool = True, stand_in: Any = None, **settings) -> None:
    """Runs `check` with a client of a gateway that has these settings."""

    async def run() -> None:
        played = stand_in or StandIn()
        async with (
            TestServer(played.app, handler_cancellation=True) as behind,
            aiohttp.ClientSession(behind.make_url("/"), auto_decompress=False) as session,
        ):
            server = SimpleNamespace(
                session=session, is_ready=is_ready, away="it is being loaded", states=getattr(played, "folder", None)
            )
            app = make_app(server, GatewaySettings(INFO, **settings))
            async with TestClient(TestServer(app, handler_cancellation=True)) as client:
                await check(client, played)

    asyncio.run(run())


async def message(response: aiohttp.ClientResponse) -> str:
    return (await response.json())["error"]["message"]


def test_what_is_not_ours_is_passed_on_as_it_is():
    async def check(client: TestClient, _: StandIn) -> None:
        answer = await client.post("/v1/a%20b?x=%26&y", data=b"body", headers={"X-Mine": "1", "Accept": "text/event-stream"})
        said = await answer.json()
        assert (said["method"], said["path"], said["body"]) == ("POST", "/v1/a%20b?x=%26&y", "body")
        assert said["headers"]["X-Mine"] == "1" and said["headers"]["Accept"] == "text/event-stream"
        assert answer.headers["X-Own"] == "yes" and "Access-Control-Allow-Origin" not in answer.headers
        assert (await client.get("/teapot")).status == 418
        assert (await (await client.delete("/slots/0")).json())["method"] == "DELETE"

    talk(check)


def test_an_answer_comes_piece_by_piece_and_ends_with_its_client():
    async def check(client: TestClient, stand_in: StandIn) -> None:
        answer = await client.get("/stream")
        assert (
            await answer.content.readuntil(b"\n\n") == b'data: {"prompt_progress": {}}\n\n'
            and answer.headers["Content-Type"] == "text/event-stream"
        )
        answer.close()
        for _ in range(100):
            if stand_in.left:
                break
            await asyncio.sleep(0.05)
        assert stand_in.left == ["/stream"]

    talk(check)


def test_half_an_answer_does_not_look_like_a_whole_one():
    async def check(client: TestClient, _: StandIn) -> None:
        answer = await client.get("/halves")
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()

    talk(check)


def test_while_the_model_is_not_there():
    async def check(client: TestClient, _: StandIn) -> None:
        answer = await client.post("/v1/chat/completions", json={})
        assert answer.status == 503 and "being loaded" in await message(answer)
        assert (await client.get("/lt/info")).status == 200

    talk(check, is_ready=False)


def test_who_has_the_key():
    async def check(client: TestClient, _: StandIn) -> None:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "right"},
            {"X-Api-Key": "wrong"},
            {"X-Api-Key": "rïght"},
        ):
            for path in ("/lt/info", "/v1/models", "/slots"):
                answer = await client.get(path, headers=headers)
                assert answer.status == 401 and "API key" in await message(answer)
        for headers in (KEY, {"authorization": "bearer right"}, {"X-Api-Key": "right"}):
            said = await (await client.get("/v1/models", headers=headers)).json()
            assert not {"authorization", "x-api-key"} & {name.lower() for name in said["headers"]}
        assert (await client.get("/health")).status == 200

    talk(check, api_key="right")


def test_pages_of_other_sites():
    async def check(client: TestClient, _: StandIn) -> None:
        elsewhere = {"Origin": "http://elsewhere:3000"}
        answer = await client.post("/v1/chat/completions", json={}, headers=elsewhere)
        assert answer.status == 403 and "--allow-origin" in await message(answer)
        assert (await client.options("/v1/chat/completions", headers=elsewhere)).status == 403
        own = str(client.make_url("/")).rstrip("/")
        assert (await client.get("/lt/info", headers={"Origin": own})).status == 200
        answer = await client.get("/lt/info", headers={"Host": "elsewhere.example"})  # a name that was made to mean this computer
        assert answer.status == 403

    talk(check)


def test_what_is_no_address_and_no_text():
    async def check(client: TestClient, _: StandIn) -> None:
        for headers, status in (
            ({"Origin": "http://["}, 403),
            ({"Host": "[::"}, 403),
            ({"Host": "[::1]:80"}, 200),
            ({"Host": ""}, 403),
        ):
            assert (await client.get("/lt/info", headers=headers)).status == status, headers

    talk(check)

    async def check_key(client: TestClient, _: StandIn) -> None:
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(b"GET /lt/info HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
        assert b" 401 " in await reader.readline()
        writer.close()

    talk(check_key, api_key="right")


@pytest.mark.parametrize("origins", [["http://elsewhere:3000"], ["*"]])
def test_pages_that_may_ask(origins):
    async def check(client: TestClient, _: StandIn) -> None:
        headers = {"Origin": "http://elsewhere:3000", "Access-Control-Request-Headers": "authorization"}
        answer = await client.options("/v1/chat/completions", headers=headers)  # which no browser sends with a key
        assert answer.status == 204 and answer.headers["Access-Control-Allow-Headers"] == "authorization"
        for path in ("/lt/info", "/v1/models", "/stream"):
            answer = await client.get(path, headers=headers | KEY)
            assert answer.status == 200 and answer.headers.getall("Access-Control-Allow-Origin") == ["http://elsewhere:3000"]
            answer.close()

    talk(check, origins=origins, api_key="right")


@pytest.mark.parametrize("is_local", [True, False])  # it may stand behind another server
def test_where_there_is_a_key_it_may_have_any_name(is_local):
    async def check(client: TestClient, _: StandIn) -> None:
        assert (await client.get("/lt/info", headers={"Host": "model.example"} | KEY)).status == 200

    talk(check, api_key="right", is_local=is_local)


def test_documents_become_text():
    async def check(client: TestClient, _: StandIn) -> None:
        async def read(data: bytes, name: str) -> tuple[int, dict]:
            answer = await client.post("/lt/document", data=data, headers={"X-Filename": name})
            return answer.status, await answer.json()

        said = {"name": "a b.txt", "text": "some words here", "description": "a b.txt (text)", "n_tokens": 3}
        assert await read(b"some words here\n", "..%2Fa%20b.txt") == (200, said)
        status, said = await read(pdf(["the first page", "the second"]), "report.pdf")
        assert status == 200 and "the second" in said["text"] and said["description"] == "report.pdf (PDF, 2 pages)"
        for data, name in ((b"", "a.txt"), (b"\x00\x01\x02" * 99, "a.bin"), (b"no such", "a.pdf"), (b"GGUF....", "a.gguf")):
            status, said = await read(data, name)
            assert status == 415 and name in said["error"]["message"]

    talk(check)


def test_what_is_too_large(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 20)

    async def check(client: TestClient, _: StandIn) -> None:
        for path in ("/lt/document", "/v1/chat/completions"):
            answer = await client.post(path, data=b"x" * ((1 << 20) + 1))
            assert answer.status == 413 and "more than 1 MiB" in await message(answer)

    talk(check)


def test_tokens_of_messages():
    async def check(client: TestClient, _: StandIn) -> None:
        said = {"messages": [{"role": "user", "content": "one two"}, {"role": "user", "content": "three"}]}
        assert await (await client.post("/lt/tokens", json=said)).json() == {"n_tokens": 3}
        for body in (b"", b"[]", b"{}", b"{"):
            answer = await client.post("/lt/tokens", data=body)
            assert answer.status == 400 and "messages" in await message(answer)
        answer = await client.post("/lt/tokens", json={"messages": []})
        assert answer.status == 400 and await message(answer) == "no messages"

    talk(check)


def test_what_a_prompt_begins_with_is_read_once(tmp_path):
    document = "word " * 300

    async def check(client: TestClient, server: StandInWithSlot) -> None:
        async def ask(text: str, **settings: object) -> list[dict]:
            said = {"messages": [{"role": "user", "content": text}], "stream": True} | settings
            server.asked.clear()
            answer = await client.post("/v1/chat/completions", json=said)
            assert answer.status == 200
            return [json.loads(line[6:]) for line in (await answer.text()).splitlines() if line.startswith("data: {")]

        first = await ask(document + "one?", lt_read_first=len(document))
        assert [*first[0]] == ["prompt_progress", "choices"] and first[1] == {
            "lt_begun": {"prompt_n": 300, "cache_n": 0, "prompt_ms": 2.5}
        }
        assert first[2]["said"]["messages"][0]["content"] == document + "one?" and first[2]["said"]["id_slot"] == 0
        assert "lt_read_first" not in first[2]["said"]
        second = await ask(document + "two?", lt_read_first=len(document))
        assert second[0] == {"lt_begun": {"prompt_n": 0, "cache_n": 300, "prompt_ms": 0}} and len(second) == 2
        assert "/slots/0?action=restore" in server.asked and "/completion" not in server.asked
        # without a stream the answer is all that comes
        assert [*(await ask(document + "two?", lt_read_first=len(document), stream=False))[0]] == ["said"]
        # a state that has gone, or can't be taken, is read anew
        for path in tmp_path.iterdir():
            path.unlink()
        assert (await ask(document + "two?", lt_read_first=len(document)))[1]["lt_begun"]["prompt_n"] == 300
        # what makes no sense, is too short or is refused: the prompt comes as it is
        for settings in ({"lt_read_first": 0}, {"lt_read_first": 10**6}, {"lt_read_first": "x"}, {"lt_read_first": 100}, {}):
            assert [*(await ask(document + "one?", **settings))[0]] == ["said"]
        for action in ("save", "restore"):  # which is the server's own affair
            answer = await client.post(f"/slots/0?action={action}", json={"filename": "mine"})
            assert answer.status == 403 and "--slot-save-path" in await message(answer)
        server.refuses = True
        assert [*(await ask("other " + document, lt_read_first=len(document)))[0]] == ["said"]

    talk(check, stand_in=StandInWithSlot(tmp_path), keeps_beginnings=True)


@pytest.mark.parametrize("keeps", [True, False])
def test_reading_before_the_question_is_there(tmp_path, keeps):
    document = "word " * 300
    said = {"messages": [{"role": "user", "content": document}], "lt_read_first": len(document)}

    async def check(client: TestClient, server: StandInWithSlot) -> None:
        answer = await client.post("/lt/read", json=said)
        *events, end = [line[6:] for line in (await answer.text()).splitlines() if line]
        assert answer.content_type == "text/event-stream" and end == "[DONE]"
        assert [*map(json.loads, events)][-1] == {"lt_begun": {"prompt_n": 300, "cache_n": 0, "prompt_ms": 2.5}}
        assert server.read == [{"id_slot": 0} if keeps else {}]
        assert ("/slots/0?action=save" in server.asked) == keeps
        server.refuses = True  # the question will say why
        answer = await client.post("/lt/read", json=said | {"messages": [{"role": "user", "content": "x" + document}]})
        assert answer.status == 200 and await answer.text() == "data: [DONE]\n\n"
        for body in (b"", b"[]", b"{}", json.dumps(said | {"lt_read_first": 0}).encode()):
            answer = await client.post("/lt/read", data=body)
            assert answer.status == 400 and "lt_read_first" in await message(answer)

    talk(check, stand_in=StandInWithSlot(tmp_path), keeps_beginnings=keeps, reads_ahead=not keeps)


def test_reading_ahead_is_of_no_use_or_not_possible():
    said = {"messages": [{"role": "user", "content": "word " * 300}], "lt_read_first": 1500}

    async def no_use(client: TestClient, _: StandIn) -> None:
        answer = await client.post("/lt/read", json=said)
        assert (answer.status, await answer.read()) == (204, b"")

    async def away(client: TestClient, _: StandIn) -> None:
        answer = await client.post("/lt/read", json=said)
        assert answer.status == 503 and "it is being loaded" in await message(answer)

    talk(no_use)
    talk(away, is_ready=False, reads_ahead=True)


def test_reading_ahead_stops_when_the_client_leaves(tmp_path):
    said = {"messages": [{"role": "user", "content": "word " * 300}], "lt_read_first": 1500}

    async def check(client: TestClient, server: StandInWithSlot) -> None:
        server.hangs = True
        answer = await client.post("/lt/read", json=said)
        assert (await answer.content.readline()).startswith(b"data: ")
        answer.close()
        for _ in range(100):
            if server.left:
                break
            await asyncio.sleep(0.05)
        assert server.left == ["/completion"]
        server.hangs = False
        assert (await client.post("/lt/read", json=said)).status == 200  # nobody waits for the one that has left

    talk(check, stand_in=StandInWithSlot(tmp_path), keeps_beginnings=True)


def test_the_oldest_beginnings_go(tmp_path):
    async def check(client: TestClient, server: StandInWithSlot) -> None:
        for i in range(5):
            content = f"{i} " * 300
            said = {"messages": [{"role": "user", "content": content}], "lt_read_first": len(content)}
            assert (await client.post("/v1/chat/completions", json=said)).status == 200
            assert len(list(tmp_path.iterdir())) == min(i + 1, 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Beginnings", partial(Beginnings, limit=3500))
        talk(check, stand_in=StandInWithSlot(tmp_path), keeps_beginnings=True)


def test_the_page(monkeypatch, tmp_path):
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "a.js").write_text("export {}")
    monkeypatch.setattr(module, "PAGE", tmp_path)

    async def check(client: TestClient, _: StandIn) -> None:
        page = await client.get("/")  # without the key, which it asks for
        assert await page.text() == "<!doctype html>" and page.content_type == "text/html"
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]
        script = await client.get("/vendor/a.js")
        assert script.status == 200 and script.content_type in ("text/javascript", "application/javascript")
        for path in ("/vendor/../../secret", "/vendor/%2e%2e/secret", "/other.js"):
            assert json.loads(await (await client.get(path, headers=KEY)).text())["method"] == "GET"  # passed on

    talk(check, api_key="right")
