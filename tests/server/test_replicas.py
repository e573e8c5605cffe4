"""Two replicas of `lt-gguf serve` behind the balancers of docs/how-to/deploy.md, with the configuration that stands there."""

from __future__ import annotations

import contextlib
import getpass
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.serve import Served, serving
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "deploy.md"
KEY = {"Authorization": "Bearer right"}
OPTIONS = ["--threads", "1", "--ctx", "4096", "--streaming", "layers=0-2;sink=2;window=60;prefill=full"]
LONG = "the quick brown fox jumps over the lazy dog " * 25


def shown(language: str, replicas: list[Served]) -> str:
    """The page's configuration, with our replicas and without a certificate."""
    text = re.search(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    for server, replica in zip(("10.0.0.11:8080", "10.0.0.12:8080"), replicas, strict=True):
        assert server in text
        text = text.replace(server, replica.address.removeprefix("http://"))
    return text


def nginx(folder: Path, replicas: list[Served], port: int) -> list[str]:
    server = re.sub(r" *(ssl_certificate|server_name).*\n", "", shown("nginx", replicas))
    server = server.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    paths = "".join(f"{kind}_temp_path {folder};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""  # its workers write into the folder
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; pid {folder}/pid; error_log {folder}/log;\nevents {{}}\nhttp {{\naccess_log off;\n{paths}{server}\n}}\n"
    )
    return ["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "log")]


def caddy(folder: Path, replicas: list[Served], port: int) -> list[str]:
    site = shown("caddyfile", replicas).replace("chat.example.org", f"http://127.0.0.1:{port}")
    (folder / "Caddyfile").write_text("{\n admin off\n}\n" + site)
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


@contextlib.contextmanager
def balancer(which: str, folder: Path, replicas: list[Served]) -> Iterator[int]:
    """A running one, by its port."""
    if shutil.which(which) is None:
        pytest.skip(f"{which} isn't installed")
    port = free_port()
    command = {"nginx": nginx, "caddy": caddy}[which](folder, replicas, port)
    with open(folder / "said", "wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=folder)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                Client(port, "127.0.0.1").get("/health")
                break
            assert process.poll() is None, (folder / "said").read_text()
            time.sleep(0.05)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def request(content: str) -> dict:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0, "ignore_eos": True}


class Client:
    """Somebody with an address of their own, who keeps cookies."""

    def __init__(self, port: int, address: str) -> None:
        self.port, self.address = port, address
        self.cookie: str | None = None

    def send(self, method: str, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60, source_address=(self.address, 0))
        headers = KEY | {"Content-Type": "application/json"} | ({"Cookie": self.cookie} if self.cookie else {})
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        if given := response.getheader("Set-Cookie"):
            self.cookie = given.split(";")[0]
        return response

    def get(self, path: str) -> bytes:
        return self.send("GET", path).read()

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        response = self.send("POST", path, body)
        return response.status, response.read()

    def chat(self, content: str, until: float = 0) -> dict:
        """The answer, asked for again until `until` while none of the replicas can be reached."""
        while True:
            status, answer = self.post("/v1/chat/completions", json.dumps(request(content)).encode())
            if status not in (502, 503) or time.monotonic() > until:
                break
            time.sleep(0.2)
        assert status == 200, answer
        return json.loads(answer)


@pytest.fixture(scope="module")
def replicas(hybrid_file) -> Iterator[list[Served]]:
    key = {"LT_GGUF_API_KEY": "right"}
    with serving(hybrid_file, *OPTIONS, environment=key) as one, serving(hybrid_file, *OPTIONS, environment=key) as other:
        yield [one, other]


def answered_by(replica: Served) -> int:
    """How many prompts a replica has read."""
    metrics = replica.ask("/metrics", headers=KEY).decode()
    return int(float(re.search(r"^llamacpp:prompt_tokens_total (\S+)", metrics, re.MULTILINE)[1]))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["nginx", "caddy"])
def test_a_conversation_stays_with_its_replica(which, tmp_path, replicas):
    with balancer(which, tmp_path, replicas) as port:
        before = [answered_by(replica) for replica in replicas]
        clients = [Client(port, f"127.0.0.{n}") for n in range(2, 12)]
        texts = [f"{which} {client.address} {LONG}" for client in clients]
        answers = []
        for client, text in zip(clients, texts, strict=True):
            first, again = client.chat(text), client.chat(text)
            answers.append(first["choices"][0]["message"]["content"])
            assert again["choices"][0]["message"]["content"] == answers[-1]
            assert again["timings"]["cache_n"] > 0.9 * first["usage"]["prompt_tokens"] > 0  # the same replica
        assert all(now > then for now, then in zip(map(answered_by, replicas), before, strict=True))  # both have work
        alone = [
            replica.ask("/v1/chat/completions", request(texts[0]), KEY | {"Content-Type": "application/json"})
            for replica in replicas
        ]
        assert {json.loads(answer)["choices"][0]["message"]["content"] for answer in alone} == {answers[0]}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["nginx", "caddy"])
def test_tokens_come_one_by_one_and_documents_pass(which, tmp_path, replicas):
    with balancer(which, tmp_path, replicas) as port:
        client = Client(port, "127.0.0.1")
        said = request("once") | {"stream": True, "max_tokens": 4000}
        response = client.send("POST", "/v1/chat/completions", json.dumps(said).encode())
        assert response.readline().startswith(b"data: ")
        slots = [slot for replica in replicas for slot in json.loads(replica.ask("/slots", headers=KEY))]
        assert any(slot["is_processing"] for slot in slots)  # the first token has come, the last one hasn't
        response.close()
        status, answer = client.post("/lt/document", b"a line of text\n" * 200_000)  # 3 MB: nginx refuses 1 MB unless told
        assert status == 200, answer
        assert json.loads(answer)["text"].startswith("a line of text")
        assert b"<html" in client.get("/")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["nginx", "caddy"])
def test_a_replica_that_dies_has_another_answer_for_it(which, tmp_path, hybrid_file):
    key = {"LT_GGUF_API_KEY": "right"}
    with (
        serving(hybrid_file, *OPTIONS, environment=key) as one,
        serving(hybrid_file, *OPTIONS, environment=key) as other,
        balancer(which, tmp_path, [one, other]) as port,
    ):
        client = Client(port, "127.0.0.1")
        before = client.chat(LONG)["choices"][0]["message"]["content"]
        has_it = one if answered_by(one) else other
        has_it.end()
        again = client.chat(LONG, time.monotonic() + 20 if which == "caddy" else 0)  # which has to notice first
        assert again["choices"][0]["message"]["content"] == before
        assert again["timings"]["cache_n"] == 0  # read by the other one
        assert client.chat(LONG)["timings"]["cache_n"] > 0  # and kept by it
