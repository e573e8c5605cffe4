"""Which format a file has, and its text. What the bytes are decides, before what the name says."""

from __future__ import annotations

import os
from pathlib import Path

from lt_gguf.documents.document import Document, DocumentError, Progress
from lt_gguf.documents.docx import docx_text, is_old_office, is_zip
from lt_gguf.documents.html import html_text, is_html
from lt_gguf.documents.pdf import is_pdf, pdf_text
from lt_gguf.documents.plain import decode

_HTML = (".html", ".htm", ".xhtml")
_MARKDOWN = (".md", ".markdown", ".mdown")
# What a folder is searched for. A file that is named is read whatever it is called, if it is text.
SUFFIXES = (*_MARKDOWN, *_HTML, ".txt", ".text", ".rst", ".pdf", ".docx")
_MOST_BYTES = 512 << 20  # no context holds so much text; a disk image is likelier


def read_file(path: str | os.PathLike[str], progress: Progress | None = None) -> Document:
    """The document in a file.

    Args:
        progress: called with pages read and pages in all, where the format has pages.

    Raises:
        DocumentError: it has no text that could be read.
        OSError: it can't be opened.
    """
    path = Path(path)
    if path.is_dir():
        raise DocumentError(f"{path}: is a folder: name a file, or a pattern such as {path / '*.pdf'}")
    if not path.is_file() and path.exists():
        raise DocumentError(f"{path}: is no file, but a device or a pipe: - reads standard input")
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise DocumentError(f"{path}: has {size >> 20} MiB, must have at most {_MOST_BYTES >> 20}")
    return read_bytes(path.read_bytes(), path.name, str(path.absolute()), progress)


def read_bytes(data: bytes, name: str, path: str = "", progress: Progress | None = None) -> Document:
    """The document in `data`; its `name` decides only where the bytes don't.

    Raises:
        DocumentError: it has no text that could be read.
    """
    suffix = Path(name).suffix.lower()
    n_pages, note = 0, ""
    if is_pdf(data):
        kind = "PDF"
        text, n_pages, note = pdf_text(data, name, progress)
    elif is_old_office(data):
        raise DocumentError(f"{name}: is an encrypted DOCX or an old .doc file: save it as a DOCX without a password, or as PDF")
    elif is_zip(data):
        kind, text = "DOCX", docx_text(data, name)
    elif data.startswith(b"GGUF"):
        raise DocumentError(f"{name}: is a GGUF model, must be text, Markdown, HTML, PDF or DOCX")
    elif is_html(data) or suffix in _HTML:
        kind = "HTML"
        text, note = html_text(data, name)
    elif suffix in (".pdf", ".docx") and data.strip():
        raise DocumentError(f"{name}: is no {suffix[1:].upper()} file, whatever its name says, or a damaged one")
    else:
        kind = "Markdown" if suffix in _MARKDOWN else "text"
        text, note = decode(data, name)
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.strip()
    if not text:
        raise DocumentError(f"{name}: is empty")
    return Document(name, text, kind, path, n_pages, note)
