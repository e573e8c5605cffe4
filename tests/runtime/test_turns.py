"""Turns, without a model: who has it, who waits and for how long."""

from __future__ import annotations

import gc
import inspect
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.sharing import LONG, Shared, n_waiting, wait_for


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
