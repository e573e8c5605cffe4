"""Plain text and Markdown, in the encodings in which they come."""

from __future__ import annotations

import codecs

from lt_gguf.documents.document import DocumentError

_MARKS = (  # note: that of UTF-32 begins as that of UTF-16 does
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What no text has; form feeds stand between the pages of old ones, escapes in what a terminal has shown.
_CONTROLS = bytes(set(range(32)) - {*b"\t\n\r\f\x1b\b"}) + b"\x7f"
_MOST_CONTROLS = 0.001  # of all bytes: a stray one doesn't make a binary file


def decode(data: bytes, name: str) -> tuple[str, str]:
    """The text of a file, and a line where its encoding was guessed (else empty).

    UTF-8; UTF-16 and UTF-32 where a byte order mark says so; else Windows-1252, which is what most other files are.

    Raises:
        DocumentError: it isn't text.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding), ""
            except UnicodeDecodeError:
                raise DocumentError(f"{name}: begins as {encoding.upper()} text does and isn't: is damaged or binary") from None
    if len(data.translate(None, delete=_CONTROLS)) < len(data) * (1 - _MOST_CONTROLS):
        raise DocumentError(f"{name}: is a binary file, must be text, Markdown, HTML, PDF or DOCX")
    try:
        return data.decode(), ""
    except UnicodeDecodeError as error:
        where = f"byte {error.start} isn't UTF-8"
    return data.decode("cp1252", errors="replace"), f"{name}: {where}, so it is read as Windows-1252"
