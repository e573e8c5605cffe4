"""One call at a time: threads that share a `Llama` take turns.

A llama.cpp context serves one thread, and an answer is many calls of it. So a call has the model for itself until it ends, and
a stream from its first item until it has ended, failed, been closed or been forgotten. Who waits is served in order.

What has the model is the *call*, not a thread: a stream may be begun in one thread and continued in others, as web servers and
`asyncio.to_thread` do. Calls that the running call makes belong to it: they are the ones in the thread that is inside now.

There are two lines to wait in. A call or a stream waits for its *turn*; and whatever touches the context is *inside* for that
moment: a call for as long as it lasts, a stream while it computes an item, and what only reads between two items.
"""

from __future__ import annotations

import inspect
import math
import queue
import threading
import time
from asyncio import _get_running_loop
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import partial, wraps
from threading import get_ident
from typing import Any

# Seconds. Who waits looks again so often, in case that Ctrl-C came between the end of a turn and the waking of the next.
_LOOK_AGAIN = 0.5
# A stream that gives no item for so long while an event loop's thread waits for it is taken to need that loop.
_STALLED = 2.0


class _Place:
    """A call's place in a line.

    Attributes:
        what: the method.
        is_stream: it gives items, and may be suspended between two of them.
        thread: the thread that runs it or, while it is suspended, ran it last.
        suspended_at: when it gave its last item, `None` while a thread runs it.
        is_over: it has left the line, or never was in it.
        woken: has an item when the place may have become the first one; `None` until it waits.
    """

    __slots__ = ("begun", "is_over", "is_stream", "suspended_at", "thread", "what", "woken")

    def __init__(self, what: str, begun: float, is_stream: bool = False) -> None:
        self.what = what
        self.begun = begun
        self.is_stream = is_stream
        self.thread = get_ident()
        self.suspended_at: float | None = None
        self.is_over = False
        self.woken: queue.SimpleQueue[None] | None = None

    def __str__(self) -> str:
        return f"{self.what} ({'a stream ' * self.is_stream}begun {time.monotonic() - self.begun:.0f} s ago)"


class _Line:
    """First come, first served.

    There is no lock in it that a finalizer, which the garbage collector may run anywhere, could find taken by its own thread:
    the operations of a deque and of a SimpleQueue are atomic, and a place leaves by having `is_over` set. That is an
    assignment at the beginning of a `finally`, before which Python delivers no Ctrl-C; then `leave` tells the next one.
    """

    def __init__(self) -> None:
        self._places: deque[_Place] = deque()

    def first(self) -> _Place | None:
        """The one that is being served."""
        while True:
            try:
                first = self._places[0]
            except IndexError:
                return None
            if not first.is_over:
                return first
            self._drop(first)

    def waiting(self) -> list[_Place]:
        """All but the first one."""
        return [place for place in list(self._places) if not place.is_over][1:]

    def join(self, place: _Place, deadline: float) -> None:
        """Waits until `place` is the first one. Raises TimeoutError, and RuntimeError if that can't come."""
        self._places.append(place)
        if self._places[0] is place:
            return
        place.woken = queue.SimpleQueue()  # note: before it looks who is the first one
        while (first := self.first()) is not place:
            assert first is not None  # its own place is in the line
            _check_deadlock(place, first, self)
            left = deadline - time.monotonic()
            if left <= 0:
                close = ", or close() that stream" * first.is_stream
                raise TimeoutError(
                    f"{place.what}: after {time.monotonic() - place.begun:.1f} s the model is still taken by {first}: let it end"
                    f"{close}, or wait longer (timeout=)"
                )
            with suppress(queue.Empty):
                place.woken.get(timeout=min(left, _LOOK_AGAIN))

    def leave(self, place: _Place) -> None:
        """Drops a place that is over, and tells the first one that it may be."""
        self._drop(place)
        if self._places and (first := self.first()) is not None and first.woken is not None:
            first.woken.put(None)

    def _drop(self, place: _Place) -> None:
        with suppress(ValueError):  # another thread has, or it never was there
            self._places.remove(place)


class Turns:
    """The turns of one `Llama`.

    Args:
        timeout: seconds for which a call waits for the others that came before it; `None`: without limit.

    Attributes:
        is_closed: set when the context is freed. Whatever wants to be inside then raises RuntimeError.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = check_timeout(timeout)
        self.is_closed = False
        self._turns = _Line()
        self._inside = _Line()

    def is_inside(self) -> bool:
        """True in the thread that is inside now: what it calls belongs to the call that it runs."""
        first = self._inside.first()
        return first is not None and first.thread == get_ident()

    def call(self, what: str, function: Callable[[], Any], timeout: float | None = None) -> Any:
        """Takes a turn for `function()`.

        Raises:
            TimeoutError: it has waited for too long.
            RuntimeError: it would wait for ever, see `_check_deadlock`, or the context is closed.
        """
        if self.is_inside():
            return function()
        turn = _Place(what, time.monotonic())
        try:
            deadline = self._deadline(timeout)
            self._turns.join(turn, deadline)
            return self.moment(what, function, deadline=deadline)
        finally:
            turn.is_over = True
            self._turns.leave(turn)

    def moment(self, what: str, function: Callable[[], Any], timeout: float | None = None, *, deadline: float = 0) -> Any:
        """Calls `function()` while nobody else is inside, between two items of a stream at the latest. Raises as `call` does."""
        if self.is_inside():
            return function()
        place = _Place(what, time.monotonic())
        try:
            self._enter(place, deadline or self._deadline(timeout))
            return function()
        finally:
            place.is_over = True
            self._inside.leave(place)

    def stream(self, what: str, make: Callable[[], Iterator[Any]], timeout: float | None = None) -> Generator[Any, Any, None]:
        """The items of `make()`, called when the first one is asked for: then, too, the turn is taken. Raises as `call` does."""
        if self.is_inside():
            yield from self._part(what, make())
            return
        turn, items, sent = _Place(what, time.monotonic(), is_stream=True), None, None
        try:
            deadline = self._deadline(timeout)
            self._turns.join(turn, deadline)
            while True:
                step = _Place(what, turn.begun)
                turn.thread, turn.suspended_at = step.thread, None
                try:
                    self._enter(step, deadline if items is None else math.inf)
                    items = make() if items is None else items
                    item = _next(items, sent)
                except StopIteration:
                    return
                finally:
                    step.is_over = True
                    self._inside.leave(step)
                turn.suspended_at = time.monotonic()
                sent = yield item
        finally:
            turn.is_over = True
            self._turns.leave(turn)

    def close(self, what: str, free: Callable[[], None]) -> None:
        """Calls `free()`, as a moment that waits without limit; it may be called again.

        Raises:
            RuntimeError: it is called from inside.
        """
        if self.is_inside():
            raise RuntimeError(f"{what}: is called by what the model itself has called: call it when that has ended")
        place = _Place(what, time.monotonic())
        try:
            self._inside.join(place, math.inf)
            self.is_closed = True
            free()
        finally:
            place.is_over = True
            self._inside.leave(place)

    def _part(self, what: str, items: Iterator[Any]) -> Generator[Any, Any, None]:
        """A stream that another call reads: it belongs to that call's turn."""
        turn, sent = self._turns.first(), None
        while True:
            if not self.is_inside() or self._turns.first() is not turn:
                raise RuntimeError(f"{what}: was begun by another call, which has ended: begin it anew")
            try:
                item = _next(items, sent)
            except StopIteration:
                return
            sent = yield item

    def _enter(self, place: _Place, deadline: float) -> None:
        self._inside.join(place, deadline)
        if self.is_closed:
            raise RuntimeError(f"{place.what}: this Llama is closed: load the model again")

    def _deadline(self, timeout: float | None) -> float:
        timeout = self.timeout if timeout is None else check_timeout(timeout)
        return math.inf if timeout is None else time.monotonic() + timeout


def takes_turn(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a class with `_turns`, as a call. It has one more argument, `timeout`, in place of what `Turns` has."""

    def call(self: Any, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        if self._turns.is_inside():
            return method(self, *args, **kwargs)
        return self._turns.call(call.__qualname__, partial(method, self, *args, **kwargs), timeout)

    return _like(method, call)


def takes_moment(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a method that leaves the context as it is, so that streams needn't end before."""

    def call(self: Any, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        if self._turns.is_inside():
            return method(self, *args, **kwargs)
        return self._turns.moment(call.__qualname__, partial(method, self, *args, **kwargs), timeout)

    return _like(method, call)


def streams(method: Callable[..., Any], always: bool = False) -> Callable[..., Any]:
    """The same for a method that returns a generator, where `always` is false only if its argument `stream` is true.

    Such a call returns at once, also where somebody else has the model: an event loop's thread may make it. Its errors come as
    ever; but what a chat handler reads into the context itself, such as an image, it reads when the stream begins.
    """
    signature = inspect.signature(method)

    def call(self: Any, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        made = partial(method, self, *args, **kwargs)
        if not always and not signature.bind(self, *args, **kwargs).arguments.get("stream", False):
            return self._turns.call(call.__qualname__, made, timeout)
        check_timeout(timeout)
        if self.chat_handler is not None:
            return self._turns.stream(call.__qualname__, made, timeout)
        items = made()
        return self._turns.stream(call.__qualname__, lambda: items, timeout)

    return _like(method, call)


def check_timeout(timeout: float | None) -> float | None:
    """Raises ValueError if it isn't a number of seconds or `None`."""
    if timeout is not None and (isinstance(timeout, (bool, str)) or not timeout >= 0):
        raise ValueError(f"timeout = {timeout!r}: must be a number of seconds, 0: don't wait, None: wait without limit")
    return timeout


def _check_deadlock(place: _Place, first: _Place, line: _Line) -> None:
    """Raises RuntimeError if `first` is a stream that can't go on because the present thread waits for it.

    A thread of a pool may well wait for a stream that it ran last: others will continue it. Not so the main thread, which runs
    one program; nor the thread of an event loop, without which nobody asks for the next item; nor the last free one of a pool.
    """
    if (since := first.suspended_at) is None:
        return
    in_loop = _get_running_loop() is not None
    if first.thread == get_ident() and (in_loop or threading.current_thread() is threading.main_thread()):
        why = "which this thread itself reads: read it to its end or close() it first"
    elif in_loop and time.monotonic() - max(since, place.begun) > _STALLED:
        why = "which doesn't go on while this event loop's thread waits: call it in another thread (asyncio.to_thread)"
    elif _is_last_of_its_pool(place, line):
        why = "as all threads of this pool do, with more work to come: give the pool more threads, or let fewer calls in"
    else:
        return
    raise RuntimeError(f"{place.what}: would wait for ever for {first}, {why}")


def _is_last_of_its_pool(place: _Place, line: _Line) -> bool:
    """True if all threads of the ThreadPoolExecutor that runs this thread wait in the line, this one at the end, while the
    executor has work for more: an item of the stream that they wait for may be among it."""
    try:
        executor = threading.current_thread()._args[0]()  # type: ignore[attr-defined]
        if executor._shutdown or executor._work_queue.empty():
            return False
        threads = {thread.ident for thread in list(executor._threads)}
        if len(threads) < executor._max_workers:
            return False
    except (AttributeError, IndexError, TypeError):
        return False  # another thread, or another Python's executor
    waiting = [other for other in line.waiting() if other.thread in threads]
    return len(waiting) == len(threads) and waiting[-1] is place


def _next(items: Iterator[Any], sent: Any) -> Any:
    return next(items) if sent is None else items.send(sent)  # type: ignore[attr-defined]


def _like(method: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with the name, the documentation and the arguments of `method`, and `timeout`."""
    call = wraps(method)(call)
    call.__qualname__ = f"Llama.{method.__name__}"
    signature = inspect.signature(method)
    parameters = list(signature.parameters.values())
    timeout = inspect.Parameter("timeout", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="float | None")
    at = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    call.__signature__ = signature.replace(parameters=[*parameters[:at], timeout, *parameters[at:]])  # type: ignore[attr-defined]
    return call
