"""HTML becomes Markdown: headings, lists, tables and code stay; scripts, styles and navigation go. (markdownify on Beautiful Soup.)"""

from __future__ import annotations

import re

from lt_gguf.documents.document import DocumentError
from lt_gguf.documents.plain import decode

_NO_TEXT = ("script", "style", "noscript", "template", "svg", "nav", "head", "iframe")
_LOOKS_SO = re.compile(rb"\s*(?:<!doctype html|<html\b|<\?xml[^>]*>\s*<!doctype html)", re.IGNORECASE)


def is_html(data: bytes) -> bool:
    return _LOOKS_SO.match(data.removeprefix(b"\xef\xbb\xbf")[:1024]) is not None


def html_text(data: bytes, name: str) -> tuple[str, str]:
    """Markdown, and a line where the encoding was guessed (else empty).

    Raises:
        DocumentError: it isn't text, or nested too deeply.
    """
    from bs4 import BeautifulSoup
    from bs4.dammit import EncodingDetector

    # note: what the page itself says of its encoding wins, as in a browser
    declared = EncodingDetector.find_declared_encoding(data, is_html=True)
    try:
        text, note = (data.decode(declared), "") if declared else decode(data, name)
    except (LookupError, UnicodeDecodeError):
        text, note = decode(data, name)
    try:
        return soup_text(BeautifulSoup(text, "html.parser")), note
    except RecursionError:
        raise DocumentError(f"{name}: its HTML is nested too deeply, save it as text") from None


def soup_text(soup: object) -> str:
    """Markdown of a parsed page, or of a part of it; `soup` is changed."""
    from bs4 import BeautifulSoup
    from markdownify import ATX, MarkdownConverter

    assert isinstance(soup, BeautifulSoup)
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    for tag in soup(_NO_TEXT):
        tag.decompose()
    converter = MarkdownConverter(heading_style=ATX, bullets="-", strip=["img", "a"], escape_misc=False, escape_underscores=False)
    text = converter.convert_soup(soup)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    # note: many pages have their title in <title> alone
    return f"{title}\n\n{text}" if title and text and title not in text else text
