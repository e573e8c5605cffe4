"""Files become text, and one that has none says so in a line."""

from __future__ import annotations

import codecs
import zipfile

import pytest
from support.document_files import docx, paragraph, pdf, table

from lt_gguf.documents import DocumentError, find_files, read_bytes, read_file

HTML = b"""<!DOCTYPE html><html><head><title>On towers</title><style>p { color: red }</style></head>
<body><nav>Home</nav><h1>Towers</h1><p>A <b>tall</b> one.</p><ul><li>stone</li><li>brick</li></ul>
<table><tr><th>name</th><th>height</th></tr><tr><td>Red</td><td>40 m</td></tr></table>
<pre><code>print("hi")
</code></pre><script>alert(1)</script></body></html>"""


def test_plain_text_and_markdown(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert read_file(tmp_path / "a.txt").text == "one\ntwo\nthree"
    (tmp_path / "a.md").write_text("# Title\n\nText with ünï¢ode.")
    document = read_file(tmp_path / "a.md")
    assert document.kind == "Markdown" and document.text.endswith("ünï¢ode.") and document.path == str(tmp_path / "a.md")
    assert document.describe() == "a.md (Markdown)" and not document.note


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(encoding):
    assert read_bytes("Grüße".encode(encoding), "a.txt").text == "Grüße"


def test_an_encoding_that_is_guessed_is_said():
    document = read_bytes("naïve “quotes”".encode("cp1252"), "old.txt")
    assert document.text == "naïve “quotes”"
    assert document.note == "old.txt: byte 2 isn't UTF-8, so it is read as Windows-1252"


def test_html_becomes_markdown():
    text = read_bytes(HTML, "page").text
    for part in ("On towers", "# Towers", "A **tall** one.", "- stone\n- brick", "| Red | 40 m |", 'print("hi")'):
        assert part in text
    assert not any(part in text for part in ("alert", "color: red", "Home"))
    latin = b'<html><head><meta charset="iso-8859-1"></head><body>Gr\xfc\xdfe</body></html>'
    assert read_bytes(latin, "page.html").text == "Grüße"


def test_a_pdf_page_by_page():
    steps = []
    document = read_bytes(
        pdf(["The red tower\nis 40 m tall.", "", "The last page."]), "tower.pdf", progress=lambda *s: steps.append(s)
    )
    assert document.text == "The red tower\nis 40 m tall.\n\nThe last page."
    assert document.n_pages == 3 and steps == [(1, 3), (2, 3), (3, 3)]
    assert document.describe() == "tower.pdf (PDF, 3 pages)"
    assert document.note == "tower.pdf: 1 of 3 pages have no text, the first is page 2"


def test_docx_becomes_markdown():
    body = paragraph("Towers", "Heading1") + paragraph("A tall one &amp; a red one.") + table([["name", "height"], ["Red", "40 m"]])
    text = read_bytes(docx(body), "towers.docx").text
    assert text.splitlines()[0] == "# Towers" and "A tall one & a red one." in text and "Red" in text and "40 m" in text


@pytest.mark.parametrize(
    "data, name, complaint",
    [
        (pdf(["", ""]), "scan.pdf", "scan.pdf: each of its 2 pages holds pictures and no text: must be a PDF with text, which OCR"),
        (pdf(["secret"], encrypted=True), "secret.pdf", "secret.pdf: is encrypted: must be a PDF without a password"),
        (pdf(["a text"])[:200], "cut.pdf", "cut.pdf: is no PDF that can be read, or a damaged one"),
        (b"hello", "a.pdf", "a.pdf: is no PDF file, whatever its name says, or a damaged one"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8\x00", "a.txt", "a.txt: begins as UTF-16 text does and isn't"),
        (bytes(range(256)) * 8, "a.bin", "a.bin: is a binary file, must be text, Markdown, HTML, PDF or DOCX"),
        (b"GGUF\x03\x00\x00\x00", "m.gguf", "m.gguf: is a GGUF model, must be text"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\x00" * 64, "old.doc", "old.doc: is an encrypted DOCX or an old .doc file"),
        (docx(paragraph("a"))[:300], "cut.docx", "cut.docx: can't be read as DOCX, is damaged (BadZipFile"),
        (b" \n\n", "a.txt", "a.txt: is empty"),
        (b"<html><body><script>x</script></body></html>", "a.html", "a.html: is empty"),
        (b"<html>" + b"<div>" * 20000, "deep.html", "deep.html: its HTML is nested too deeply"),
    ],
)
def test_what_has_no_text_says_why(data, name, complaint):
    with pytest.raises(DocumentError) as error:
        read_bytes(data, name)
    assert str(error.value).startswith(complaint) and "\n" not in str(error.value)


def test_an_archive_is_no_document(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(DocumentError, match="is an archive and no DOCX document: unpack it"):
        read_file(tmp_path / "a.zip")


def test_what_is_no_file(tmp_path):
    with pytest.raises(DocumentError, match="is a folder: name a file, or a pattern"):
        read_file(tmp_path)
    with pytest.raises(DocumentError, match="is no file, but a device"):
        read_file("/dev/null")


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    for name in ("b.md", "a.txt", "c.py", "deep/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)

    def names(*words: str) -> list[str]:
        return [str(path) for path in find_files(words)]

    assert names("c.py", "a.txt", "c.py") == ["c.py", "a.txt"]
    assert names(".") == ["a.txt", "b.md"]
    assert names(str(tmp_path), "*.py") == [str(tmp_path / "c.py")]
    assert names("**/*.md") == ["b.md", "deep/d.md"]
    assert names("deep", "b.md") == ["deep/d.md", "b.md"]
    (tmp_path / "odd[1].txt").write_text("text")
    assert names("odd[1].txt") == ["odd[1].txt"]  # a file before a pattern
    for words, complaint in [
        (["none.txt"], "none.txt: there is no such file"),
        (["*.pdf"], "*.pdf: no file is called so"),
        (["deep", "*.pdf"], "deep/*.pdf: no file is called so"),
    ]:
        with pytest.raises(DocumentError) as error:
            find_files(words)
        assert str(error.value) == complaint
