"""llama.cpp's log, which says what its functions don't: why a model can't be loaded."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

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


class _Logs:
    """The callback that llama.cpp calls while any with block is open, and who listens to it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open: list[tuple[int, ErrorLog]] = []
        self.previous = _llama_cpp.llama_log_callback()
        self.previous_data = ctypes.c_void_p()
        self.forward = 0
        self.level = 0
        self.callback = _llama_cpp.llama_log_callback(self.receive)

    def receive(self, level: int, text: bytes, data: int | None) -> None:
        if level != _LEVEL_CONTINUED:
            self.level = level
        if self.level == _LEVEL_ERROR:
            line = text.decode(errors="replace")
            for thread, log in self.open:
                if thread != threading.get_ident():
                    continue
                if level == _LEVEL_CONTINUED and log.errors:
                    log.errors[-1] += line
                else:
                    log.errors.append(line)
        if self.forward and self.previous:
            self.previous(level, text, self.previous_data)


_logs = _Logs()


@contextmanager
def captured_errors(forward: bool) -> Iterator[ErrorLog]:
    """Collects the errors that llama.cpp logs in this thread during the with block; blocks may nest and overlap.

    Args:
        forward: pass the log on to where it went before; else none of it is shown.
    """
    log = ErrorLog()
    entry = (threading.get_ident(), log)
    with _logs.lock:
        if not _logs.open:
            _llama_cpp.llama_log_get(ctypes.byref(_logs.previous), ctypes.byref(_logs.previous_data))
            _llama_cpp.llama_log_set(_logs.callback, ctypes.c_void_p())
        _logs.open.append(entry)
        _logs.forward += forward
    try:
        yield log
    finally:
        with _logs.lock:
            _logs.open.remove(entry)
            _logs.forward -= forward
            if not _logs.open:
                _llama_cpp.llama_log_set(_logs.previous, _logs.previous_data)
