"""Several clients at once on a llama-server with a tiny hybrid model: does it live, and is every answer what transformers says?

    python scripts/checks/soak_server.py [--operations N] [--prefill full|stream] [--separate] [--draft none|ngram|model] [--server PATH]

Each client has a slot of its own, in which it goes on with a conversation, edits it, asks the same or an earlier question once more,
leaves in the middle of a prompt or of an answer, or begins anew; prompts together may need more memory than LT_PROMPT_LIMIT allows,
so some are refused. The server says how many tokens of a prompt it had, and from this and from what was sent follows what each
token saw (specification, section 4): with that transformers computes the logits, and every token of the answer must be the likeliest
one. Ends with an error if the server ends, answers anything else, or refuses what it should not.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support import server
from support.oracle import Subject, random_tokens

N_SLOTS, N_CTX_SLOT, N_BATCH, N_UBATCH = 4, 1024, 256, 64
SINK, WINDOW, LAYERS, N_LAYER = 4, 40, (1, 3), 4
N_ANSWER = 40  # most tokens
EOS = 2
OPEN = 2**31 - 1  # the end of a prompt that is being read
TIE = 1e-3  # logits nearer than that are the same: where cells lie changes the order of sums
ACTIONS = {"message": 8, "edit": 4, "again": 3, "earlier": 2, "leave": 4, "begin": 2}  # how often each is done
LIMIT_MIB = 1  # 2,048 tokens of the streaming layers, half of what four full slots need


class SoakError(Exception):
    """An answer that is wrong, or none."""


class Slot:
    """What a slot of the server holds, as far as it is known, and which of it was read together."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.prompts: list[tuple[int, int]] = []  # begin, end

    def ask(self, prompt: list[int], n_cached: int) -> None:
        """The prompt was read, but for its first tokens, which were there."""
        if n_cached > len(common(self.tokens, prompt)):
            raise SoakError(f"{n_cached} tokens are said to be there, {len(common(self.tokens, prompt))} can be")
        self.prompts = [(b, e if e <= n_cached else OPEN) for b, e in self.prompts if b < n_cached]
        n = len(prompt)
        if n_cached < n:
            if self.prompts and self.prompts[-1][1] == OPEN:
                self.prompts[-1] = (self.prompts[-1][0], n)
            elif n - n_cached > 1:
                self.prompts.append((n_cached, n))
        self.tokens = list(prompt)


def common(a: list[int], b: list[int]) -> list[int]:
    n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return a[:n]


class Client(threading.Thread):
    """The user of one slot."""

    def __init__(self, soak: Soak, slot: int) -> None:
        super().__init__(name=f"slot {slot}")
        self.soak, self.id_slot = soak, slot
        self.random = random.Random(soak.options.seed * 100 + slot)
        self.slot = Slot()
        self.asked: list[list[int]] = []  # the prompts of this conversation
        self.past: deque[str] = deque(maxlen=8)
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while self.soak.takes_one_more():
                action = self.random.choices(list(ACTIONS), list(ACTIONS.values()))[0]
                self.soak.count(action)
                self.act(action)
                time.sleep(self.random.choice([0, 0, 0, 0.01]))
        except Exception as error:  # whatever it is, the others stop, too
            self.error = SoakError(f"{self.name}: {error}; before: {', '.join(self.past)}")
            self.soak.stop.set()

    def new_tokens(self, most: int) -> list[int]:
        return random_tokens(self.random.randint(1, most), self.random.getrandbits(32)).tolist()

    def act(self, action: str) -> None:
        held = self.slot.tokens
        if action == "again" and self.asked:
            prompt = self.asked[-1]
        elif action == "earlier" and self.asked:
            prompt = self.random.choice(self.asked)
        elif action == "edit" and held:
            prompt = held[: self.random.randint(1, len(held))] + self.new_tokens(200)
        elif action == "begin":
            prompt, self.asked = self.new_tokens(900), []
        else:
            prompt = held + self.new_tokens(300)
        if len(prompt) > N_CTX_SLOT - N_ANSWER - 2:
            prompt, self.asked = self.new_tokens(300), []
        if action == "leave":
            self.leave(prompt)
        else:
            self.ask(prompt)

    def ask(self, prompt: list[int]) -> None:
        connection, response = self.send(prompt, stream=False)
        body = json.loads(response.read())
        connection.close()
        if response.status != 200:
            self.refused(prompt, response.status, body)
            return
        n_cached, answer = body["timings"]["cache_n"], body["tokens"]
        self.past.append(f"ask {len(prompt)} cached {n_cached} answered {len(answer)}")
        self.slot.ask(prompt, n_cached)
        self.asked.append(prompt)
        self.soak.check(self.slot, answer)
        self.slot.tokens = prompt + answer[:-1]  # the last one was never decoded

    def leave(self, prompt: list[int]) -> None:
        """As soon as the server has said what it had of the prompt, or somewhat later."""
        connection, response = self.send(prompt, stream=True)
        if response.status != 200:
            self.refused(prompt, response.status, json.loads(response.read()))
            return
        n_cached, answer = None, []
        n_events = self.random.choice([1, 1, 2, 5, 20])
        for event in events(response):
            progress = event.get("prompt_progress")
            n_cached = progress["cache"] if progress and n_cached is None else n_cached
            answer += event.get("tokens", [])
            n_events -= 1
            if n_events <= 0 and n_cached is not None:
                break
        connection.close()
        self.past.append(f"leave {len(prompt)} cached {n_cached} after {len(answer)} tokens")
        if n_cached is not None:
            self.slot.ask(prompt, n_cached)
            self.slot.tokens = prompt + answer

    def refused(self, prompt: list[int], status: int, body: dict) -> None:
        if status != 400 or "tokens would fit" not in json.dumps(body) or len(prompt) <= N_UBATCH:
            raise SoakError(f"{len(prompt)} tokens were refused with {status}: {json.dumps(body)[:300]}")
        self.past.append(f"refused {len(prompt)}")
        self.soak.count("refused")

    def send(self, prompt: list[int], stream: bool) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.soak.address, timeout=900)
        options = {"n_predict": self.random.randint(1, N_ANSWER), "temperature": 0, "ignore_eos": True, "return_tokens": True}
        options |= {"prompt": prompt, "id_slot": self.id_slot, "cache_prompt": True, "stream": stream, "return_progress": stream}
        connection.request("POST", "/completion", json.dumps(options), {"Content-Type": "application/json"})
        return connection, connection.getresponse()


def events(response: http.client.HTTPResponse) -> Iterator[dict]:
    with suppress(http.client.HTTPException):
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


class Soak:
    """The server's clients, what they count, and transformers."""

    def __init__(self, options: argparse.Namespace, subject: Subject) -> None:
        self.options, self.subject = options, subject
        self.spec = subject.spec(SINK, WINDOW, LAYERS, prefill=options.prefill)
        self.address = ""
        self.counts: Counter[str] = Counter()
        self.worst = 0.0
        self.stop = threading.Event()
        self._n_left, self._lock, self._oracle = options.operations, threading.Lock(), threading.Lock()

    def takes_one_more(self) -> bool:
        with self._lock:
            self._n_left -= 1
            return self._n_left >= 0 and not self.stop.is_set()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def check(self, slot: Slot, answer: list[int]) -> None:
        """The likeliest token each time, of what the slot holds."""
        tokens, n = slot.tokens + answer[:-1], len(slot.tokens)
        prompts = slot.prompts if self.options.prefill == "full" else None
        with self._oracle:
            logits = self.subject.expected(np.array(tokens), self.spec, prompts)[n - 1 :]
        logits[:, EOS] = -np.inf  # ignored
        behind = logits.max(-1) - logits[np.arange(len(answer)), answer]
        with self._lock:
            self.worst = max(self.worst, float(behind.max()))
        if behind.max() > TIE:
            first = int(np.argmax(behind > TIE))
            raise SoakError(
                f"token {first} of an answer to {n} tokens is {behind[first]:.3g} behind the likeliest; prompts {slot.prompts}"
            )

    def run(self, progress: Progress) -> list[Client]:
        clients = [Client(self, slot) for slot in range(N_SLOTS)]
        task = progress.add_task("operations", total=self.options.operations)
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            progress.update(task, completed=sum(self.counts[action] for action in ACTIONS))
            time.sleep(0.2)
        return clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=10_000, metavar="N")
    parser.add_argument("--prefill", choices=["full", "stream"], default="full")
    parser.add_argument("--separate", action="store_true", help="a cache for each slot instead of one for all")
    parser.add_argument("--draft", choices=["none", "ngram", "model"], default="none")
    parser.add_argument("--server", type=Path, help="another llama-server than the installed one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        subject = Subject.build("llama", N_LAYER, place)
        soak = Soak(options, subject)
        settings = ["--ctx-size", str(N_SLOTS * N_CTX_SLOT), "--parallel", str(N_SLOTS), "--batch-size", str(N_BATCH)]
        settings += ["--ubatch-size", str(N_UBATCH), "--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"]
        settings += ["--no-kv-unified" if options.separate else "--kv-unified"]
        if options.draft == "ngram":
            settings += ["--spec-type", "ngram-mod", "--spec-ngram-mod-n-min", "1", "--spec-ngram-mod-n-match", "3"]
        if options.draft == "model":
            (place / "draft").mkdir()
            settings += [
                "--spec-type",
                "draft-simple",
                "--model-draft",
                str(Subject.build("llama", 2, place / "draft").native.path),
            ]
        os.environ["LT_PROMPT_LIMIT"] = str(LIMIT_MIB)
        log = place / "server.log"
        try:
            with server.running(subject.native.path, str(soak.spec), log, *settings, tool=options.server) as address:
                soak.address = urlsplit(address).netloc
                with Progress(console=Console(stderr=True)) as progress:
                    clients = soak.run(progress)
                errors = [client.error for client in clients if client.error]
                health = http.client.HTTPConnection(soak.address, timeout=10)
                with suppress(OSError):
                    health.request("GET", "/health")
                    if health.getresponse().status == 200 and not errors:
                        print(f"alive; largest distance of a token from the likeliest {soak.worst:.1e}; {dict(soak.counts)}")
                        return
        finally:
            tail = log.read_text()[-3000:] if log.exists() else ""
        print(tail, file=sys.stderr)
        sys.exit(f"soak_server: {errors[0] if errors else 'the server ended'} ({dict(soak.counts)})")


if __name__ == "__main__":
    main()
