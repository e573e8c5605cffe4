"""DOCX becomes Markdown: mammoth makes HTML of it, and `html.py` does the rest."""

from __future__ import annotations

import io
import zipfile

from lt_gguf.documents.document import DocumentError
from lt_gguf.documents.html import soup_text

_OLD_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # the container of .doc, and of encrypted .docx files
_MOST_BYTES = 256 << 20  # of XML in a file, unpacked: more is no document, but an attack


def is_old_office(data: bytes) -> bool:
    return data.startswith(_OLD_OFFICE)


def is_zip(data: bytes) -> bool:
    return data.startswith(b"PK\x03\x04")


def docx_text(data: bytes, name: str) -> str:
    """Markdown.

    Raises:
        DocumentError: it isn't a DOCX file that could be read.
    """
    import mammoth
    from bs4 import BeautifulSoup

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = {part.filename: part.file_size for part in archive.infolist() if part.filename.endswith((".xml", ".rels"))}
        if "word/document.xml" not in parts:
            raise DocumentError(f"{name}: is an archive and no DOCX document: unpack it and name the files in it")
        if sum(parts.values()) > _MOST_BYTES:
            raise DocumentError(f"{name}: unpacks to {sum(parts.values()) >> 20} MiB of text, must be at most {_MOST_BYTES >> 20}")
        # note: pictures would become text, megabytes of base64
        converted = mammoth.convert_to_html(io.BytesIO(data), convert_image=mammoth.images.img_element(lambda _: {"src": ""}))
        return soup_text(BeautifulSoup(converted.value, "html.parser"))
    except DocumentError:
        raise
    except RecursionError:
        raise DocumentError(f"{name}: is nested too deeply, save it as text") from None
    except Exception as error:
        # note: of a damaged file mammoth raises what its XML parser, zipfile or a missing key raises
        raise DocumentError(f"{name}: can't be read as DOCX, is damaged ({type(error).__name__}: {error})") from None
