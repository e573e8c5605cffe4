"""Turns, without a model: those that would never come, Ctrl-C, and the end."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.sharing import LONG, Shared, n_waiting, wait_for

from lt_gguf.runtime import turns


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


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
