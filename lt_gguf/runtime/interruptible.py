"""Ctrl-C while a long prompt is read: it stops the batch at hand, which of a large model takes half a minute, and not after it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lt_gguf.runtime.library import load_llama_cpp

_llama_cpp = load_llama_cpp().llama_cpp


@contextmanager
def stopped_by_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C only makes what it gives true; whoever asks it stops, by an error or not, and then KeyboardInterrupt is
    raised. Python hands a signal only to its main thread, and only there is anything changed."""
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):  # ignored, or somebody else's
        yield lambda: False
        return
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: stopped
    except RuntimeError:
        if not stopped:
            raise
    finally:
        signal.signal(signal.SIGINT, handler)
    if stopped:
        raise KeyboardInterrupt


@contextmanager
def interruptible(context: Any) -> Iterator[Callable[[], None]]:
    """Within the block Ctrl-C aborts what llama.cpp computes on the CPU, which then raises KeyboardInterrupt. Call what it gives
    between two batches: it raises it there.

    llama.cpp asks before each operation of a batch, so this is for prompts; a token is too short for it to be worth its time.
    """
    with stopped_by_ctrl_c() as is_stopped:

        def check() -> None:
            if is_stopped():
                raise KeyboardInterrupt

        # note: it runs Python code in the main thread, and so the handler of a signal that came while llama.cpp computed
        callback = _llama_cpp.ggml_abort_callback(lambda _: is_stopped())
        _llama_cpp.llama_set_abort_callback(context, callback, None)
        try:
            yield check
        finally:
            _llama_cpp.llama_set_abort_callback(context, _llama_cpp.ggml_abort_callback(), None)
