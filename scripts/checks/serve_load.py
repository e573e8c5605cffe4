"""Many clients talk with `lt-gguf serve` at once, about one long document and about others, and some leave in the middle.

    python scripts/checks/serve_load.py MODEL.gguf [--clients 16] [--seconds 600] [--parallel 4] [--streaming SPEC]

Each client asks one of a few questions, streamed or not, at temperature 0; a quarter leave before the answer is complete. First each
question is asked alone. Counted are the answers that are the same as then (with others in the batch, rounding can differ: compare
with --streaming off), and all errors. Prints a line of counts, the tokens that were read and that weren't read again, and the memory
of llama-server and of the gateway after a third of the time and at the end. Exits with 1 if a request failed that its client didn't
break off, if llama-server died, or if memory grew by more than a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.serve import Served, serving

N_DOCUMENTS, N_QUESTIONS, N_TOKENS = 3, 4, 24
_KEPT = 64  # MiB of conversations without a slot that the server keeps: full early, so that what grows after that is a leak
SENTENCE = "The {} house on the {} hill was built in {} by a family of {} who sold {} in the town below it. "


def document(number: int, n_sentences: int) -> str:
    rng = random.Random(number)
    words = "red old white narrow steep quiet millers bakers smiths painters wool bread lamps paper salt".split()
    return "".join(
        SENTENCE.format(*rng.choices(words, k=2), rng.randrange(1500, 1999), *rng.choices(words, k=2)) for _ in range(n_sentences)
    )


def questions(n_sentences: int) -> list[list[dict[str, str]]]:
    """The first document is everybody's: half of the questions are about it."""
    asked = []
    for number in range(N_DOCUMENTS):
        for i in range(N_QUESTIONS if number else N_QUESTIONS * (N_DOCUMENTS - 1)):
            text = f"Document {number}.txt:\n\n{document(number, n_sentences)}\n\nEnd of the document {number}.txt.\n\nQuestion {i}: what was sold?"
            asked.append([{"role": "user", "content": text}])
    return asked


class Load:
    def __init__(self, address: str, asked: list[list[dict[str, str]]], seed: int) -> None:
        self.address, self.asked, self.seed = f"{address}/v1/chat/completions", asked, seed
        self.alone: list[str] = []
        self.counts: Counter[str] = Counter()

    async def ask(self, session: aiohttp.ClientSession, i: int, stream: bool, leaves_after: float | None = None) -> str | None:
        """The answer; `None` if the client has left."""
        said = {"messages": self.asked[i], "max_tokens": N_TOKENS, "temperature": 0, "stream": stream, "seed": 1}
        try:
            async with asyncio.timeout(leaves_after), session.post(self.address, json=said) as response:
                body = await response.read()
                if response.status != 200:
                    self.counts[f"status {response.status}: {body[:200].decode(errors='replace')}"] += 1
                    return None
        except TimeoutError:
            self.counts["left"] += 1
            return None
        if not stream:
            answer = json.loads(body)
            self.counts["tokens read"] += answer["timings"]["prompt_n"]
            self.counts["tokens not read again"] += answer["timings"]["cache_n"]
            return answer["choices"][0]["message"]["content"] or ""
        lines = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
        if not lines or lines[-1] != "[DONE]":
            self.counts["a stream without an end"] += 1
            return None
        events = [json.loads(line) for line in lines[:-1]]
        return "".join(choice["delta"].get("content") or "" for event in events for choice in event.get("choices", []))

    async def client(self, number: int, end: float) -> None:
        rng = random.Random(self.seed * 1000 + number)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=900)) as session:
            while time.monotonic() < end:
                i = rng.randrange(len(self.asked))
                answer = await self.ask(session, i, rng.random() < 0.5, rng.uniform(0, 5) if rng.random() < 0.25 else None)
                if answer is not None:
                    self.counts["as alone" if answer == self.alone[i] else "otherwise than alone"] += 1

    async def run(self, n_clients: int, seconds: float, note: asyncio.Event) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=900)) as session:
            for i in range(len(self.asked)):
                answer = await self.ask(session, i, stream=False)
                if answer is None:
                    raise SystemExit(f"serve_load: the first questions failed: {dict(self.counts)}")
                self.alone.append(answer)
        self.counts.clear()
        end = time.monotonic() + seconds
        clients = [asyncio.create_task(self.client(number, end)) for number in range(n_clients)]
        await asyncio.sleep(seconds / 3)
        note.set()
        await asyncio.gather(*clients)


def memory(served: Served) -> dict[str, int]:
    return {"llama-server": served.child().memory_info().rss, "gateway": psutil.Process(served.process.pid).memory_info().rss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--sentences", type=int, default=60, help="of a document")
    parser.add_argument("--streaming")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    more = [] if options.streaming is None else ["--streaming", options.streaming]
    settings = "--parallel", options.parallel, "--ctx", options.ctx, "--threads", options.threads, *more
    with serving(options.model, *settings, "--", "--cache-ram", _KEPT) as served:
        load = Load(served.address, questions(options.sentences), options.seed)
        child, first = served.child().pid, {}

        async def watched() -> None:
            note = asyncio.Event()
            running = asyncio.create_task(load.run(options.clients, options.seconds, note))
            noting = asyncio.create_task(note.wait())
            await asyncio.wait({running, noting}, return_when=asyncio.FIRST_COMPLETED)
            first.update(memory(served))
            await running

        asyncio.run(watched())
        last, died = memory(served), served.child().pid != child
    print(", ".join(f"{what} {n}" for what, n in sorted(load.counts.items())))
    print(", ".join(f"{name} {first[name] / 2**20:.0f} MiB, {last[name] / 2**20:.0f} at the end" for name in first))
    failed = sorted(what for what in load.counts if what.startswith(("status", "a stream")))
    grown = sorted(name for name in first if last[name] > 1.1 * first[name])
    if failed or grown or died:
        sys.exit(f"serve_load: {'llama-server died; ' if died else ''}{'; '.join(failed)}{f'grew: {grown}' if grown else ''}")


if __name__ == "__main__":
    main()
