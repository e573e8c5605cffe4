"""Turns, without a model: who has it, who waits, for how long, and what is an error."""

from __future__ import annotations

import asyncio
import gc
import inspect
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from lt_gguf.runtime import turns
from lt_gguf.runtime.turns import Turns, streams, takes_moment, takes_turn

LONG = 10  # seconds that no test takes unless it fails


class Shared:
    """Counts who is inside."""

    def __init__(self, timeout: float | None = None) -> None:
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


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


# --------------------------------------------------------------------------------------------- one at a time


def test_nobody_is_inside_with_another(pool):
    shared = Shared()

    def use(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(100):
            kind = choose.randrange(5)
            if kind == 0:
                shared.work(1e-5)
            elif kind == 1:
                shared.look(1e-5)
            elif kind == 2:
                assert list(shared.generate(3, 1e-5)) == [0, 1, 2]
            elif kind == 3:
                assert shared.answer(3) == [0, 1, 2]
            else:
                assert next(shared.answer(3, stream=True)) == 0

    for done in [pool.submit(use, seed) for seed in range(8)]:
        done.result(timeout=60)
    assert shared.n_inside == 0 and n_waiting(shared) == 0


def test_what_a_call_calls_belongs_to_it():
    shared = Shared(timeout=0)
    assert shared.work(then=lambda: shared._turns.call("nested", lambda: "done")) == "done"
    assert shared._turns.call("outer", lambda: list(shared.generate(2))) == [0, 1]
    assert shared._turns.call("outer", lambda: shared._turns.moment("inner", lambda: 1)) == 1
    assert shared.is_free()


def test_first_come_first_served(pool):
    shared, served = Shared(), []
    stream = shared.generate(1)
    pool.submit(next, stream).result()
    calls = []
    for i in range(6):
        calls.append(pool.submit(lambda i=i: shared.work(then=lambda: served.append(i))))
        wait_for(lambda i=i: n_waiting(shared) == i + 2)
    stream.close()
    for call in calls:
        call.result(timeout=LONG)
    assert served == list(range(6))


# --------------------------------------------------------------------------------------------- streams


def exhausted(stream):
    assert list(stream) == [1, 2]


def failed(stream):
    next(stream)
    with pytest.raises(ArithmeticError):
        next(stream)


def thrown_at(stream):
    with pytest.raises(KeyError):
        stream.throw(KeyError())


def closed(stream):
    stream.close()


@pytest.mark.parametrize("end", [exhausted, failed, thrown_at, closed])
@pytest.mark.parametrize("where", ["here", "in another thread"])
def test_a_stream_has_the_turn_until_it_ends(pool, end, where):
    shared = Shared()
    stream = shared.generate(3, fails_at=2 if end is failed else None)
    assert next(stream) == 0
    waits = pool.submit(shared.work)
    wait_for(lambda: n_waiting(shared) == 2)
    shared.look()
    assert not waits.done()
    if where == "here":
        end(stream)
    else:
        pool.submit(end, stream).result(timeout=LONG)
    waits.result(timeout=LONG)


def test_a_forgotten_stream_gives_up_the_turn(pool):
    shared = Shared()
    for _ in shared.generate(3):
        break
    shared.work(timeout=0)
    cycle = [shared.generate(3)]
    cycle.append(cycle)
    next(cycle[0])
    waits = pool.submit(shared.work)
    wait_for(lambda: n_waiting(shared) == 2)
    del cycle
    assert not waits.done()
    pool.submit(gc.collect).result()
    waits.result(timeout=LONG)


def test_a_stream_that_nobody_reads_waits_for_nothing_and_stops_nobody(pool):
    shared = Shared()
    running = shared.generate(2)
    next(running)
    unread = [shared.answer(2, stream=True), shared.generate(2)]
    running.close()
    shared.work(timeout=0)
    assert [list(stream) for stream in unread] == [[0, 1], [0, 1]]


def test_what_is_sent_arrives():
    shared = Shared()
    for stream in (shared.generate(2), shared._turns.stream("outer", lambda: shared.generate(2))):
        next(stream)
        stream.send("word")
        stream.close()
    assert shared.log == ["word", "word"]


def test_a_part_of_a_call_does_not_outlive_it():
    shared, begun = Shared(), []

    def begin():
        begun.append(shared.generate(3))
        next(begun[0])

    shared._turns.call("outer", begin)
    with pytest.raises(RuntimeError, match="generate: was begun by another call, which has ended"):
        next(begun[0])
    with pytest.raises(StopIteration):
        next(begun[0])


def test_a_chat_handler_reads_when_its_stream_begins():
    shared = Shared()
    shared.answer(2, stream=True)
    assert shared.log == ["made"]
    shared.chat_handler = object()
    stream = shared.answer(2, stream=True)
    assert shared.log == ["made"]
    assert list(stream) == [0, 1]
    assert shared.log == ["made", "made"]
    with pytest.raises(TypeError):
        shared.answer(2, True, None, stream=True)


# -------------------------------------------------------------------------------------------- timeouts


@pytest.mark.parametrize("holder", ["call", "stream"])
@pytest.mark.parametrize("waiter", ["work", "generate", "answer", "look"])
def test_timeouts(pool, holder, waiter):
    shared = Shared(timeout=0.05)
    go_on = threading.Event()
    if holder == "call":
        done = pool.submit(lambda: shared.work(then=lambda: go_on.wait(LONG)))
        wait_for(lambda: shared.n_inside == 1)
    else:
        stream = shared.generate(2)
        pool.submit(next, stream).result()
    use = {
        "work": lambda **timeout: shared.work(**timeout),
        "generate": lambda **timeout: list(shared.generate(1, **timeout)),
        "answer": lambda **timeout: shared.answer(1, **timeout),
        "look": lambda **timeout: shared.look(**timeout),
    }[waiter]
    if (holder, waiter) == ("stream", "look"):
        use()
    else:
        for timeout in ({}, {"timeout": 0}, {"timeout": 0.01}):
            begun = time.monotonic()
            what = r"generate \(a stream begun 0 s ago\): let it end, or close\(\) that stream" if holder == "stream" else "work"
            with pytest.raises(TimeoutError, match=f"{waiter}: after 0.. s the model is still taken by Llama.{what}") as error:
                use(**timeout)
            assert "\n" not in str(error.value)
            assert time.monotonic() - begun < LONG / 2
        late = pool.submit(use, timeout=LONG)
        time.sleep(0.1)
        assert not late.done()
        go_on.set()
        if holder == "stream":
            stream.close()
        late.result(timeout=LONG)
    go_on.set()
    if holder == "call":
        done.result(timeout=LONG)
    else:
        stream.close()
    assert n_waiting(shared) == 0 and shared.is_free()


@pytest.mark.parametrize("timeout", [-1, "5", True, float("nan")])
def test_bad_timeouts(timeout):
    with pytest.raises(ValueError, match=f"timeout = {timeout!r}: must be a number of seconds"):
        Shared(timeout)
    shared = Shared()
    for call in (shared.work, shared.look):
        with pytest.raises(ValueError, match="timeout = "):
            call(timeout=timeout)
    with pytest.raises(ValueError, match="timeout = "):
        shared.answer(1, stream=True, timeout=timeout)
    assert shared.is_free()


def test_methods_say_that_they_take_it():
    assert list(inspect.signature(Shared.work).parameters) == ["self", "seconds", "then", "timeout"]
    assert Shared.work.__doc__ == "Works." and Shared.work.__name__ == "work"


# ------------------------------------------------------------------------------------------- deadlocks


@pytest.mark.parametrize("use", ["work", "generate", "answer"])
def test_the_main_thread_does_not_wait_for_its_own_stream(use):
    shared = Shared()
    stream = shared.generate(3)
    next(stream)
    call = {"work": shared.work, "generate": lambda: next(shared.generate(1)), "answer": lambda: shared.answer(1)}[use]
    with pytest.raises(RuntimeError, match="this thread itself reads: read it to its end or close") as error:
        call()
    assert "\n" not in str(error.value)
    shared.look()
    assert list(stream) == [1, 2]
    call()


def test_a_pools_thread_waits_for_a_stream_that_it_has_read():
    """Another thread may go on with it: the same worker serves other requests meanwhile."""
    shared = Shared()
    stream = shared.generate(2)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(next, stream).result()
        waits = one.submit(shared.work)
        wait_for(lambda: n_waiting(shared) == 2)
        assert other.submit(list, stream).result(timeout=LONG) == [1]
        waits.result(timeout=LONG)


def test_each_item_in_a_thread_of_its_own():
    shared = Shared()

    async def read(n: int) -> list[int]:
        stream, items = shared.answer(n, stream=True), []
        while (item := await asyncio.to_thread(next, stream, None)) is not None:
            items.append(item)
            shared.look()
        return items

    async def all_of_them():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(12))
        calls = [asyncio.to_thread(shared.answer, n) for n in range(1, 6)]
        return await asyncio.wait_for(asyncio.gather(*(read(n) for n in range(1, 6)), *calls), LONG)

    assert asyncio.run(all_of_them()) == 2 * [list(range(n)) for n in range(1, 6)]


def test_a_pool_keeps_a_thread_for_the_stream_that_its_threads_wait_for():
    shared = Shared()
    with ThreadPoolExecutor(3) as pool:
        stream = shared.generate(3)
        assert pool.submit(next, stream).result() == 0
        calls = [pool.submit(shared.work) for _ in range(5)]
        assert pool.submit(list, stream).result(timeout=LONG) == [1, 2]
        errors = [call.exception(timeout=LONG) for call in calls]
    assert [type(error) for error in errors if error] == [RuntimeError] * 3
    assert "all threads of this pool" in str(errors[2])


def test_an_event_loop_does_not_wait_for_a_stream_that_needs_it(monkeypatch):
    monkeypatch.setattr(turns, "_STALLED", 0.2)
    shared = Shared()

    async def serve():
        stream = shared.generate(3)
        await asyncio.to_thread(next, stream)
        with pytest.raises(RuntimeError, match=r"while this event loop's thread waits: .* \(asyncio.to_thread\)"):
            shared.work()
        return await asyncio.to_thread(list, stream)

    assert asyncio.run(asyncio.wait_for(serve(), LONG)) == [1, 2]


def test_an_event_loop_waits_for_a_stream_that_goes_on(monkeypatch, pool):
    monkeypatch.setattr(turns, "_STALLED", 0.2)
    shared = Shared()
    stream = shared.generate(100, 0.005)
    pool.submit(next, stream).result()
    rest = pool.submit(list, stream)

    async def serve():
        shared.work()

    asyncio.run(serve())
    assert len(rest.result(timeout=LONG)) == 99


# --------------------------------------------------------------------------------- Ctrl-C, and the end


def test_ctrl_c_while_waiting(pool):
    shared = Shared()
    go_on = threading.Event()
    done = pool.submit(lambda: shared.work(then=lambda: go_on.wait(LONG)))
    wait_for(lambda: shared.n_inside == 1)
    for use in (shared.work, shared.look, lambda: next(shared.generate(1)), shared.close):
        pool.submit(lambda: (time.sleep(0.05), signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            use()
    assert n_waiting(shared) == 1
    go_on.set()
    done.result(timeout=LONG)
    assert shared.is_free()


def test_ctrl_c_at_any_moment():
    """In the middle of it, too, nobody keeps a turn that he doesn't use."""
    shared, choose, n_interrupted = Shared(), random.Random(0), 0
    try:
        for i in range(1500):
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            try:
                # note: once more where Python has lost it, in a callback of the garbage collector
                signal.setitimer(signal.ITIMER_REAL, choose.uniform(1e-6, 1e-4), 0.2)
                while True:
                    shared._turns.call("call", int)
                    shared._turns.moment("moment", int)
                    for _ in shared._turns.stream("stream", lambda: iter(range(3))):
                        pass
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
                n_interrupted += 1
            assert shared._turns._turns.first() is shared._turns._inside.first() is None, i
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert n_interrupted == 1500


def test_close(pool):
    shared = Shared()
    go_on = threading.Event()
    stream = shared.generate(3)
    pool.submit(next, stream).result()
    waits = pool.submit(shared.work)
    looks = pool.submit(shared._turns.moment, "moment", lambda: go_on.wait(LONG))
    wait_for(lambda: shared._turns._inside.first() is not None)
    closes = [pool.submit(shared.close) for _ in range(2)]
    time.sleep(0.05)
    assert shared.log == []
    go_on.set()
    for done in (looks, *closes):
        done.result(timeout=LONG)
    assert shared.log == ["freed", "freed"]
    for use in (lambda: next(stream), lambda: waits.result(timeout=LONG), shared.look):
        with pytest.raises(RuntimeError, match="this Llama is closed"):
            use()


def test_close_from_inside():
    shared = Shared()
    with pytest.raises(RuntimeError, match="close: is called by what the model itself has called"):
        shared._turns.call("call", shared.close)
    shared.close()
    assert shared.log == ["freed"]
