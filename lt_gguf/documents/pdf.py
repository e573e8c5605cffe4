"""PDF becomes text, page by page, by PDFium (pypdfium2)."""

from __future__ import annotations

import re

from lt_gguf.documents.document import DocumentError, Progress

_PASSWORD = 4  # FPDF_ERR_PASSWORD of fpdfview.h
_FORMAT = 3  # FPDF_ERR_FORMAT


def is_pdf(data: bytes) -> bool:
    return b"%PDF-" in data[:1024]  # readers allow as much before it


def pdf_text(data: bytes, name: str, progress: Progress | None = None) -> tuple[str, int, str]:
    """The text, the number of pages, and a line if some pages have no text (else empty).

    Raises:
        DocumentError: it is encrypted, damaged, or a scan.
    """
    import pypdfium2

    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        raise DocumentError(f"{name}: {_reason(error)}") from None
    try:
        pages = []
        for i in range(len(pdf)):
            pages.append(_page_text(pdf, i))
            if progress is not None:
                progress(i + 1, len(pdf))
    except pypdfium2.PdfiumError as error:
        raise DocumentError(f"{name}: page {len(pages) + 1} can't be read ({error}): is damaged") from None
    finally:
        pdf.close()
    empty = [number for number, page in enumerate(pages, 1) if not page]
    scan = "holds pictures and no text: must be a PDF with text, which OCR makes of a scan (ocrmypdf scan.pdf searchable.pdf)"
    if len(empty) == len(pages):
        raise DocumentError(f"{name}: {'its page' if len(pages) == 1 else f'each of its {len(pages)} pages'} {scan}")
    note = f"{name}: {len(empty)} of {len(pages)} pages have no text, the first is page {empty[0]}" if empty else ""
    return "\n\n".join(page for page in pages if page), len(pages), note


def _reason(error: Exception) -> str:
    code = getattr(error, "err_code", None)
    if code == _PASSWORD:
        return "is encrypted: must be a PDF without a password (qpdf --decrypt --password=… in.pdf out.pdf makes one)"
    if code == _FORMAT:
        return "is no PDF that can be read, or a damaged one"
    return f"can't be read as PDF ({error})"


def _page_text(pdf: object, i: int) -> str:
    page = pdf[i]  # type: ignore[index]
    try:
        text_page = page.get_textpage()
        try:
            text = text_page.get_text_bounded()
        finally:
            text_page.close()
    finally:
        page.close()
    # note: PDFium marks a hyphen at a line's end with U+FFFE or U+0002; the word goes on in the next line
    text = re.sub(r"[\ufffe\x02]\r?\n?", "", text.replace("\x00", ""))
    text = re.sub(r"\r\n?", "\n", text)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip()
