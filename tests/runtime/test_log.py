"""llama.cpp's log where threads listen to it: each gets its own lines."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lt_gguf.runtime.log import _LEVEL_CONTINUED, _LEVEL_ERROR, _logs, captured_errors


@pytest.fixture
def shown(monkeypatch) -> list[bytes]:
    """What is passed on to where the log went before."""
    lines: list[bytes] = []
    with captured_errors(forward=False):  # so that no block below is the first, which would ask llama.cpp
        monkeypatch.setattr(_logs, "previous", lambda level, text, data: lines.append(text))
        yield lines
        monkeypatch.undo()


def log(text: str, level: int = _LEVEL_ERROR) -> None:
    _logs.receive(level, text.encode(), None)


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_quiet_thread_silences_no_other(shown):
    log("here")
    in_thread(lambda: log("without a block"))

    def with_blocks() -> None:
        with captured_errors(forward=False):
            log("quiet")
            with captured_errors(forward=True):
                log("loud")

    in_thread(with_blocks)
    assert shown == [b"without a block", b"loud"]


def test_a_line_is_continued_by_its_own_thread(shown):
    with captured_errors(forward=False) as errors:
        log("failed to ")
        in_thread(lambda: log("info", level=2))
        log("load", level=_LEVEL_CONTINUED)
    assert errors.errors == ["failed to load"]


def test_no_line_is_lost_while_others_come_and_go(shown):
    end = threading.Event()

    def come_and_go() -> None:
        while not end.is_set():
            with captured_errors(forward=False):
                pass

    def listen(i: int) -> None:
        for n in range(300):
            with captured_errors(forward=False) as errors:
                log(f"{i} {n}")
            assert errors.errors == [f"{i} {n}"]

    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(come_and_go) for _ in range(3)]
        list(pool.map(listen, range(3)))
        end.set()
        for other in others:
            other.result()
