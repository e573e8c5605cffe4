"""Sends `lt-gguf serve` what no client should send, while another client talks: no crash, no foreign text, no lost answer.

    python scripts/checks/fuzz_server.py MODEL.gguf [--requests 2000] [--seed 0] [--parallel 2]

Requests are valid ones with a part replaced by something else (another type, a huge number, half of a character, a deep list),
bodies that are no JSON, files that are no documents, unknown paths and methods. Each must be answered, by JSON or by an event stream
that ends; 500 only with a message in it. All the time another client asks the same question with a secret word in it: it must get
an answer, the same as alone at the end (in between, what is in the batch beside it can round it differently: counted), and nobody else
may see the word. Exits with 1, and the request that showed it, if something of that fails, or if llama-server has died.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.serve import Served, serving

SECRET = "quizzaciously"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the quick brown fox"}]
CHAT = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0, "stream": False, "seed": 1, "stop": ["."], "logprobs": True}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", CHAT | {"lt_read_first": 5}),
    ("/v1/chat/completions", CHAT | {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}}),
    ("/v1/completions", {"prompt": "the quick brown fox", "max_tokens": 4}),
    ("/completion", {"prompt": [1, 2, 3], "n_predict": 4, "cache_prompt": True, "id_slot": 0, "samplers": ["top_k"], "n_probs": 2}),
    ("/completion", {"prompt": "fox", "n_predict": 0, "grammar": 'root ::= "a"', "logit_bias": [[5, -1]]}),
    ("/infill", {"input_prefix": "the", "input_suffix": "fox", "n_predict": 3}),
    ("/tokenize", {"content": "the quick brown fox", "add_special": True, "with_pieces": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/apply-template", {"messages": MESSAGES}),
    ("/v1/embeddings", {"input": ["fox"]}),
    ("/v1/rerank", {"query": "fox", "documents": ["dog", "fox"]}),
    ("/lt/tokens", {"messages": MESSAGES}),
    ("/lora-adapters", {"id": 0, "scale": 1.0}),
    ("/slots/0?action=erase", {}),
    ("/slots/0?action=save", {"filename": "../../etc/passwd"}),
]
READ = [
    "/v1/models",
    "/props",
    "/metrics",
    "/lt/info",
    "/health",
    "/",
    "/lt",
    "/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/\x7f",
]
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    2**63,
    -(2**40),
    "",
    "\ud800",
    "\0",
    "a" * 20000,
    [],
    [[[[[]]]]],
    {},
    {"a": {}},
    ["x"] * 3000,
    0.5,
]


def deep(rng: random.Random) -> Any:
    value: Any = rng.choice(ODD)
    for _ in range(rng.randrange(1, 200)):
        value = [value] if rng.random() < 0.5 else {"messages": value}
    return value


def mutated(said: Any, rng: random.Random) -> Any:
    """One place of it, somewhere inside, is something else."""
    said = copy.deepcopy(said)
    place, inner = said, said
    while isinstance(inner, (dict, list)) and inner and (inner is said or rng.random() < 0.6):
        place, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = place[key]
    if place is said and not said:
        return deep(rng)
    way = rng.random()
    if way < 0.15 and isinstance(place, dict):
        del place[key]
    elif way < 0.25 and isinstance(place, dict):
        place[f"{key}x"] = place.pop(key)
    else:
        place[key] = deep(rng) if way < 0.35 else rng.choice(ODD)
    return said


def request(rng: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and headers."""
    headers = {"Content-Type": "application/json"}
    path, said = rng.choice(VALID)
    kind = rng.random()
    if kind < 0.75:
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            said = mutated(said, rng) if isinstance(said, dict) else said
        return "POST", path, json.dumps(said).encode(), headers
    if kind < 0.83:
        body = json.dumps(said).encode()
        at = rng.randrange(len(body) + 1)
        return "POST", path, rng.choice([body[:at], body[:at] + rng.randbytes(5) + body[at:], rng.randbytes(300), b""]), headers
    if kind < 0.9:
        name = rng.choice(["a.pdf", "a.docx", "a.html", "a.md", "../a", "%FF", "a\u00e9.txt".encode().decode("latin-1"), ""])
        start = rng.choice([b"%PDF-1.7\n", b"PK\3\4", b"<html>", b"", b"\xff\xfe"])
        return "POST", "/lt/document", start + rng.randbytes(rng.randrange(2000)), {"X-Filename": name}
    method = rng.choice(["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "POST"])
    return method, rng.choice([*READ, path]), b"", headers


async def answer_to(session: aiohttp.ClientSession, what: tuple[str, str, bytes, dict[str, str]]) -> tuple[int, bytes, str]:
    method, path, body, headers = what
    async with session.request(method, path, data=body or None, headers=headers) as answer:
        return answer.status, await answer.read(), answer.content_type


def complaint(status: int, body: bytes, kind: str) -> str | None:
    """What is wrong with an answer."""
    if SECRET.encode() in body:
        return "somebody else's text"
    if status < 500:
        return None
    try:
        return None if kind == "application/json" and json.loads(body)["error"]["message"] else "no message"
    except (ValueError, KeyError, TypeError):
        return f"no JSON with a message, but {body[:200]!r}"


async def secret(session: aiohttp.ClientSession) -> str:
    said = {
        "messages": [{"role": "user", "content": f"{SECRET} the lazy dog"}],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": False,
    }
    async with session.post("/v1/chat/completions", json=said) as answer:
        return json.loads(await answer.read())["choices"][0]["message"]["content"]


async def fuzz(served: Served, options: argparse.Namespace) -> str | None:
    """What failed, if something did."""
    rng = random.Random(options.seed)
    counts: Counter[int] = Counter()
    process, done = served.child(), asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(served.address, timeout=timeout) as session:
        alone = await secret(session)
        differs = 0

        async def talk() -> int:
            n = 0
            while not done.is_set():
                nonlocal differs
                differs += await secret(session) != alone
                n += 1
            return n

        talking = asyncio.create_task(talk())
        try:
            for i in range(options.requests):
                what = request(rng)
                try:
                    status, body, kind = await answer_to(session, what)
                except (aiohttp.ClientError, TimeoutError) as error:
                    if isinstance(error, (aiohttp.InvalidURL, aiohttp.ServerDisconnectedError)) and not process.is_running():
                        return f"{what!r}: llama-server has died"
                    return f"{what!r}: {error!r}"
                counts[status] += 1
                if wrong := complaint(status, body, kind):
                    return f"{what!r}: {status}, {wrong}"
                if not process.is_running():
                    return f"{what!r}: llama-server has died"
                if i % 200 == 199:
                    print(f"{i + 1} requests", file=sys.stderr)
                if talking.done():
                    return f"{what!r}: the other client got no answer: {talking.exception()!r}"
        finally:
            done.set()
        n_talks = await talking
        same = await secret(session) == alone
    print(
        f"{options.requests} requests: {dict(sorted(counts.items()))}; {n_talks} answers of the other client, {differs} of them others than alone"
    )
    return None if same else "the other client's answer is no longer what it was"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=2)
    options = parser.parse_args()
    more = ("--ctx", "1024", "--threads", "1", "--parallel", options.parallel, "--streaming", "layers=0-2;sink=2;window=60")
    with serving(options.model, *more) as served:
        if failed := asyncio.run(fuzz(served, options)):
            raise SystemExit(f"error: {failed[:3000]}")


if __name__ == "__main__":
    main()
