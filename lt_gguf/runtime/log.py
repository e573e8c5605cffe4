"""llama.cpp's log, which says what its functions don't: why a model can't be loaded."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lt_gguf.runtime.library import load_llama_cpp

_llama_cpp = load_llama_cpp().llama_cpp

# note: from ggml.h; llama_cpp's own table has other numbers, so that it shows warnings where it means errors
_LEVEL_ERROR = 4
_LEVEL_CONTINUED = 5

# The lines that give the exception's text. What follows them only repeats that something failed.
_REASON = re.compile(r"(?:error loading model|failed to initialize the context): (.+)", re.DOTALL)


class ErrorLog:
    """The errors that llama.cpp logged in a with block, oldest first."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    @property
    def reason(self) -> str:
        """One line that says what went wrong, empty if nothing was logged."""
        lines = [" ".join(error.split()) for error in self.errors]
        reasons = [found[1] for line in lines if (found := _REASON.search(line))]
        # note: a line begins with the name of the function
        return (reasons or [re.sub(r"^\w+: ", "", line) for line in lines] or [""])[0]


@dataclass(eq=False)
class _Block:
    """A with block that is open, of the thread that listens."""

    forward: bool
    log: ErrorLog = field(default_factory=ErrorLog)
    thread: int = field(default_factory=threading.get_ident)


class _Logs:
    """The callback that llama.cpp calls while any with block is open, and who listens to it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open: tuple[_Block, ...] = ()  # replaced, never changed: threads go over it without the lock
        self.previous = _llama_cpp.llama_log_callback()
        self.previous_data = ctypes.c_void_p()
        self.last = threading.local()
        self.callback = _llama_cpp.llama_log_callback(self.receive)

    def receive(self, level: int, text: bytes, data: int | None) -> None:
        if level != _LEVEL_CONTINUED:
            self.last.level = level
        blocks = [block for block in self.open if block.thread == threading.get_ident()]
        if getattr(self.last, "level", None) == _LEVEL_ERROR:
            line = text.decode(errors="replace")
            for errors in (block.log.errors for block in blocks):
                if level == _LEVEL_CONTINUED and errors:
                    errors[-1] += line
                else:
                    errors.append(line)
        # note: what a thread without a block logs goes where it would go if nobody had one
        if (not blocks or any(block.forward for block in blocks)) and self.previous:
            self.previous(level, text, self.previous_data)


_logs = _Logs()


@contextmanager
def captured_errors(forward: bool) -> Iterator[ErrorLog]:
    """Collects the errors that llama.cpp logs in this thread during the with block; blocks may nest and overlap.

    Args:
        forward: pass this thread's log on to where it went before; else, unless another of its blocks does, none of it is shown.
    """
    block = _Block(forward)
    with _logs.lock:
        if not _logs.open:
            _llama_cpp.llama_log_get(ctypes.byref(_logs.previous), ctypes.byref(_logs.previous_data))
            _llama_cpp.llama_log_set(_logs.callback, ctypes.c_void_p())
        _logs.open = (*_logs.open, block)
    try:
        yield block.log
    finally:
        with _logs.lock:
            _logs.open = tuple(one for one in _logs.open if one is not block)
            if not _logs.open:
                _llama_cpp.llama_log_set(_logs.previous, _logs.previous_data)
