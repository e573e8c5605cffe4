"""`Document`: the text of a file that a person wants to ask about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Called with the parts (pages) that have been read, and how many there are.
Progress = Callable[[int, int], None]


class DocumentError(ValueError):
    """A file has no text that could be read; one line that names it and says what would help."""


@dataclass(frozen=True)
class Document:
    """What a file says.

    Args:
        name: what a person calls it, the file's name without its folder.
        text: all of it, never empty; Markdown where the format has headings, lists or tables.
        kind: the format, as in PDF.
        path: where it was read, empty for a pipe.
        n_pages: number of pages, 0 in a format that has none.
        note: a line for the person, if something had to be guessed or left out; else empty.
    """

    name: str
    text: str
    kind: str
    path: str = ""
    n_pages: int = 0
    note: str = ""

    def describe(self) -> str:
        """As in "report.pdf (PDF, 12 pages)"."""
        pages = f", {self.n_pages} page{'s' * (self.n_pages != 1)}" if self.n_pages else ""
        return f"{self.name} ({self.kind}{pages})"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "text": self.text, "kind": self.kind, "path": self.path, "n_pages": self.n_pages}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Document:
        """Raises KeyError, TypeError or ValueError: it isn't what `to_json` gave."""
        strings = [said[key] for key in ("name", "text", "kind", "path")]
        n_pages = said["n_pages"]
        if not all(isinstance(value, str) for value in strings) or isinstance(n_pages, bool) or not isinstance(n_pages, int):
            raise TypeError("a document's fields must be text, and its number of pages a number")
        name, text, kind, path = strings
        return cls(name, text, kind, path, n_pages)
