"""What MkDocs calls while it builds the site (mkdocs.yml): the commands' own help, and the READMEs that lie outside docs/.

Links stay as they are right in the repository, so that the files can be read there, too; here they become links of the site.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs"

# Files of the repository that are pages of the site; the pictures beside them come along.
OUTSIDE = {
    "ggml-patch/README.md": "explanation/patch.md",
    "models/demo/README.md": "evidence/demo-model.md",
    "models/smollm2/README.md": "evidence/smollm2.md",
}
PICTURES = (".png", ".svg")

HELP_PLACE = "<!-- help of all commands -->"

_FENCE = re.compile(r"^(```.*?^```[ \t]*$)", re.DOTALL | re.MULTILINE)
_BLOCK = re.compile(r"(- |\d+\. |\|)")  # what begins an item of a list or a row of a table
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside docs/."""
    from mkdocs.structure.files import File  # note: here, so that the tests need no MkDocs

    for source, page in site_places().items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if HELP_PLACE in markdown:
        markdown = markdown.replace(HELP_PLACE, help_of_all_commands())
    sources = {place: source for source, place in site_places().items()}
    uri = page.file.src_uri
    return with_blank_lines(site_links(markdown, sources.get(uri, f"{DOCS}/{uri}"), uri))


def with_blank_lines(markdown: str) -> str:
    """Blank lines before lists and tables: Python's Markdown wants them, GitHub's doesn't, and neither do our pages."""

    def separate(text: str) -> str:
        lines: list[str] = []
        inside = False  # a list or a table
        if text.startswith("\n"):  # a block of code stands before it
            text = "\n" + text
        for line in text.split("\n"):
            begins = _BLOCK.match(line) is not None
            if begins and not inside and lines and lines[-1].strip():
                lines.append("")
            inside = bool(line.strip()) and (begins or inside)
            lines.append(line)
        return "\n".join(lines)

    parts = _FENCE.split(markdown)
    return "".join(part if i % 2 else separate(part) for i, part in enumerate(parts))


def site_places() -> dict[str, str]:
    """The place on the site of each file outside docs/ that is on it."""
    places = dict(OUTSIDE)
    for source, page in OUTSIDE.items():
        pictures = (path for path in sorted((ROOT / source).parent.iterdir()) if path.suffix in PICTURES)
        places |= {path.relative_to(ROOT).as_posix(): f"{PurePosixPath(page).parent}/{path.name}" for path in pictures}
    return places


def site_links(markdown: str, source: str, uri: str) -> str:
    """The text of the file `source` with links that are right at `uri` on the site; what isn't on the site is named without a link."""
    places = site_places()

    def link(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        place = places.get(wanted, wanted.removeprefix(f"{DOCS}/") if wanted.startswith(f"{DOCS}/") else None)
        if place is None and (ROOT / wanted).exists():
            return text
        if place is None:  # MkDocs reports it
            return match[0]
        return f"{picture}[{text}]({posixpath.relpath(place, posixpath.dirname(uri) or '.')}{hash_sign}{anchor})"

    parts = _FENCE.split(markdown)
    return "".join(part if i % 2 else _LINK.sub(link, part) for i, part in enumerate(parts))


def help_of_all_commands() -> str:
    """What each command prints with --help, as Markdown. It needs neither torch nor the native library: the package may lie in its
    checkout, not installed and so not compiled."""
    if str(ROOT) not in sys.path:  # note: MkDocs takes back what a hook does to it while it is loaded
        sys.path.insert(0, str(ROOT))
    from lt_gguf.cli import COMMANDS

    parts = [f"```text\n{help_of()}```\n"]
    parts += [f"## lt-gguf {name}\n\n```text\n{help_of(name)}```\n" for name in COMMANDS]
    return "\n".join(parts)


def help_of(*command: str) -> str:
    run = [sys.executable, "-c", "from lt_gguf.cli import main; main()", *command, "--help"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    text = subprocess.run(run, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True, text=True).stdout
    return re.sub(r",\s+here\s+\d+(?=\.)", "", text)  # how many cores the machine has that builds the site
