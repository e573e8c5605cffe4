"""A file that a person wants to ask about becomes text: plain text, Markdown, HTML, PDF, DOCX.

One file a format, each with a function that takes bytes and gives Markdown or plain text; `reading.py` decides which, and
`finding.py` which files a path or a pattern means.
"""

from lt_gguf.documents.document import Document, DocumentError, Progress
from lt_gguf.documents.finding import find_files
from lt_gguf.documents.reading import SUFFIXES, read_bytes, read_file

__all__ = ["SUFFIXES", "Document", "DocumentError", "Progress", "find_files", "read_bytes", "read_file"]
