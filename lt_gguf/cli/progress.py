"""The bar on stderr that commands show while they measure."""

from __future__ import annotations

from typing import Self


class ProgressBar:
    """A bar, where stderr is a terminal; a context manager. Call it with what is being done, steps done and steps in all."""

    def __init__(self, description: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(description, total=None)

    def __enter__(self) -> Self:
        return self  # note: it appears with the first step, where there is none it never does

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar.start()
        self._bar.update(self._task, completed=done, total=total, description=what)

    def announce(self, line: str) -> None:
        """Prints a line that stays, also where there is no terminal."""
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
