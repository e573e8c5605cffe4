"""`Shared`: an object that threads share by turns, and counts who is inside."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from lt_gguf.runtime.turns import Turns, streams, takes_moment, takes_turn

LONG = 10  # seconds that no test takes unless it fails


class Shared:
    """Counts who is inside."""

    def __init__(self, timeout: float | None = LONG) -> None:
        self._turns = Turns(timeout)
        self.chat_handler = None
        self.n_inside = 0
        self.log: list[object] = []

    @takes_turn
    def work(self, seconds: float = 0.0, then=None):
        """Works."""
        return self._work(seconds, then)

    @takes_moment
    def look(self, seconds: float = 0.0):
        return self._work(seconds)

    @partial(streams, always=True)
    def generate(self, n: int, seconds: float = 0.0, fails_at: int | None = None):
        for i in range(n):
            if i == fails_at:
                raise ArithmeticError
            self._work(seconds)
            sent = yield i
            if sent is not None:
                self.log.append(sent)

    @streams
    def answer(self, n: int, stream: bool = False):
        self.log.append("made")
        return self.generate(n) if stream else list(self.generate(n))

    def close(self) -> None:
        self._turns.close("close", lambda: self.log.append("freed"))

    def _work(self, seconds: float, then=None):
        self.n_inside += 1
        assert self.n_inside == 1
        time.sleep(seconds)
        result = then and then()
        self.n_inside -= 1
        return result

    def is_free(self) -> bool:
        """Another thread gets a turn at once."""
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: self.work(timeout=1) is None).result()


def wait_for(condition) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def n_waiting(shared: Shared) -> int:
    return len(shared._turns._turns._places)
