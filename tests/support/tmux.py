"""A program in a real terminal, by tmux: keys go in, and what stands on the screen comes out."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

SECONDS = 60.0  # most that a text is waited for


class Terminal:
    """A tmux server of its own with one window."""

    def __init__(self, folder: Path, width: int = 100, height: int = 30) -> None:
        self._socket = f"lt-gguf-test-{uuid.uuid4().hex[:12]}"
        self._folder = folder
        self._size = ("-x", str(width), "-y", str(height))

    def start(self, command: list[object], environment: dict[str, str], raw: Path | None = None) -> None:
        """Runs a command; `raw`: a file that gets all bytes that it writes."""
        words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        line = " ".join(["env", *words, *(shlex.quote(str(word)) for word in command)])
        # note: what it was is still on the screen when it has ended, and `ENDED` says so
        self._tmux("-f", "/dev/null", "new-session", "-d", *self._size, f"sleep 0.5; {line}; echo ENDED $?; sleep 600")
        if raw is not None:
            self._tmux("pipe-pane", "-o", f"cat > {shlex.quote(str(raw))}")

    def keys(self, *keys: str) -> None:
        """Presses keys by tmux's names: Enter, Tab, C-c."""
        self._tmux("send-keys", *keys)

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)

    def paste(self, text: str) -> None:
        """As a terminal pastes: in brackets, where the program asked for them."""
        subprocess.run(["tmux", "-L", self._socket, "load-buffer", "-"], input=text, text=True, check=True, timeout=10)
        self._tmux("paste-buffer", "-p")

    def screen(self, lines_before: int = 0, colours: bool = False) -> str:
        """What stands there; with `colours`, also the escapes that make them."""
        before = ["-S", f"-{lines_before}"] if lines_before else []
        return self._tmux("capture-pane", "-p", *(["-e"] if colours else ["-J"]), *before)

    def wait(self, text: str, n: int = 1, seconds: float = SECONDS) -> str:
        """The screen, with what has scrolled away, when `text` stands on it `n` times. Fails if it doesn't come."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            shown = self.screen(500)
            if shown.count(text) >= n:
                return shown
            time.sleep(0.1)
        raise AssertionError(f"{text!r} doesn't come {n} times:\n{self.screen(500)}")

    def close(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self._tmux("kill-server")

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-L", self._socket, *arguments]
        return subprocess.run(command, cwd=self._folder, check=True, capture_output=True, text=True, timeout=20).stdout


@contextlib.contextmanager
def terminal(folder: Path, **size: int) -> Iterator[Terminal]:
    window = Terminal(folder, **size)
    try:
        yield window
    finally:
        window.close()
