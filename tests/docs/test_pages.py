"""The documentation does what it says: its commands run, the outputs that it shows come, and its links lead somewhere.

Every fenced `sh` or `python` block of README.md and docs/ is run, or a comment on the line before it says why not, and perhaps what is run
in its place:

    <!-- not run: needs a GPU -->
    <!-- not run: takes an hour, in its place: make quick -->

Options of `lt-gguf` are checked in blocks that aren't run, too.

The blocks of a page run one after the other in one folder, in which there are what `folder_of_a_page` puts there. A `text` block
after `<!-- output -->` is what the block before it prints: each of its lines, where … stands for anything. Links
and the names of files in any tracked Markdown file lead to something, too.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from lt_gguf.cli import COMMANDS, build_app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

RUN_BY = {"sh": ["bash", "-eu", "-o", "pipefail", "-c"], "python": [sys.executable, "-c"]}
SHOWN = ("", "text", "json", "ini", "caddyfile", "dockerfile", "nginx")
SECONDS = 300  # most of one block

_FENCE = re.compile(r"^\s*```+\s*(\S*)\s*$")
_NOT_RUN = re.compile(r"^<!-- not run: (?P<why>\S.*?)(?:, in its place: (?P<instead>\S.*))? -->$")
_OUTPUT = "<!-- output -->"
_LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
_FOLDERS = "cmake|convert|docs|ggml-patch|lt_gguf|models|requirements|scripts|tests"
_PATH = re.compile(rf"(?<![\w./-])(?:{_FOLDERS})/[\w./-]*\w\.(?:cpp|h|json|md|patch|py|sh|svg|toml|txt)\b")
_VARIES = re.compile(r"[\d.,]+ (tokens/s|CPU thread)s?")  # from one machine to the next


@dataclass(frozen=True)
class Block:
    """A fenced block: the number of its first line, its language, the line before it, and its text."""

    line: int
    language: str
    before: str
    text: str

    @property
    def to_run(self) -> str | None:
        """What is run for it, `None` if nothing is."""
        if self.language not in RUN_BY:
            return None
        said = _NOT_RUN.match(self.before)
        return said["instead"] if said else self.text

    @property
    def commands(self) -> list[list[str]]:
        """The words of its `lt-gguf` commands."""
        if self.language != "sh":
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines if line.startswith("lt-gguf ")]
        return [line[1:] for line in words]


def blocks_of(markdown: str) -> list[Block]:
    blocks: list[Block] = []
    opened: tuple[int, str] | None = None
    before, inside = "", []
    for number, line in enumerate(markdown.splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, inside = (number, fence[1]), []
        elif opened is None:
            before = line.strip() or before
        elif fence and not fence[1]:
            blocks.append(Block(*opened, before, "\n".join(inside)))
            opened, before = None, ""
        else:
            inside.append(line)
    assert opened is None, f"line {opened}: the block doesn't end"
    return blocks


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def pages() -> list[Any]:
    params = []
    for page in PAGES:
        needs_model = any("smollm2" in (block.to_run or "") for block in blocks_of(page.read_text()))
        params.append(pytest.param(page, id=name_of(page), marks=[pytest.mark.real_model] if needs_model else []))
    return params


def folder_of_a_page(folder: Path, demo_gguf: Path) -> Path:
    """What a reader has who follows a page: a checkout's models/ and scripts/, a checkpoint, a GGUF file, a text, conversations."""
    for name in ("models", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "MODEL").symlink_to(ROOT / "models" / "demo")
    shutil.copy(demo_gguf, folder / "model.gguf")
    (folder / "text.txt").write_text((ROOT / "models" / "demo" / "example.txt").read_text())
    turn = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "%s"}]}\n'
    said = [
        ("Hello!", "Hello! How can I help you?"),
        ("Thank you.", "You are welcome."),
        ("Tell me a story.", "Once there was a fox."),
    ]
    (folder / "conversations.jsonl").write_text("".join(turn % pair for pair in said * 4))
    return folder


def run(block: Block, command: str, folder: Path) -> str:
    """What it prints. Fails if it can't be run."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*RUN_BY[block.language], command],
        check=False,
        cwd=folder,
        env=os.environ | {"PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"line {block.line}: exit status {done.returncode} of\n{command}\n{done.stdout}"
    return done.stdout


def missing_line(shown: str, printed: str) -> str | None:
    """The first line of `shown` that isn't in `printed`, in this order."""
    shown, printed = (_VARIES.sub(r"N \1", text) for text in (shown, printed))
    start = 0
    for line in shown.splitlines():
        pattern = ".*?".join(re.escape(part) for part in line.strip().split("…"))
        found = re.compile(pattern, re.DOTALL).search(printed, start)
        if found is None:
            return line
        start = found.end()
    return None


@pytest.mark.slow
@pytest.mark.parametrize("page", pages())
def test_the_commands_of_a_page(page, tmp_path, request):
    blocks = blocks_of(page.read_text())
    unknown = [block for block in blocks if block.language not in (*RUN_BY, *SHOWN)]
    assert not unknown, f"line {unknown[0].line}: {unknown[0].language}: must be {', '.join(RUN_BY)} or one of {SHOWN}"
    folder: Path | None = None
    printed: str | None = None
    for block in blocks:
        if command := block.to_run:
            folder = folder or folder_of_a_page(tmp_path, request.getfixturevalue("demo_gguf"))
            printed = run(block, command, folder)
        elif block.before == _OUTPUT:
            assert printed is not None, f"line {block.line}: nothing was run before it"
            missing = missing_line(block.text, printed)
            assert missing is None, f"line {block.line}: {missing!r} isn't in\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_of_commands_that_are_not_run(page):
    not_run = [block for block in blocks_of(page.read_text()) if block.to_run != block.text]
    for block in not_run:
        for name, *arguments in block.commands:
            if name.startswith("-"):
                continue
            assert name in COMMANDS, f"line {block.line}: there is no lt-gguf {name}"
            redirected = next((i for i, word in enumerate(arguments) if word in ("<", ">", "|", "||")), len(arguments))
            try:
                subcommand(name).make_context(name, arguments[:redirected])
            except Exception as error:  # typer has had click inside and outside of it, so its class has no lasting name
                raise AssertionError(f"line {block.line}: lt-gguf {name}: {getattr(error, 'message', error)}") from error


def subcommand(name: str) -> Any:
    return typer.main.get_command(build_app()).commands[name]


def test_outputs_are_compared():
    assert missing_line("a … c\n84.0 tokens/s", "a b c\nd\n3 tokens/s") is None
    assert missing_line("b\na", "a\nb") == "a"
    assert missing_line("1 of 3", "1 of 2") == "1 of 3"


def test_a_block_says_why_it_is_not_run():
    def to_run(before: str) -> str | None:
        return blocks_of(f"{before}\n```sh\nmake\n```\n")[0].to_run

    assert to_run("<!-- not run: takes minutes -->") is None
    assert to_run("<!-- not run: takes minutes, in its place: make quick -->") == "make quick"
    assert to_run("<!-- not run: -->") == to_run("A sentence.") == "make"


def tracked_pages() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode:  # no checkout
        return PAGES
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).exists()]


@pytest.mark.parametrize("page", tracked_pages(), ids=name_of)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^\s*```.*?^\s*```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in _LINK.findall(prose):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        wanted = page if not path else page.parent / path
        assert wanted.exists(), f"{target}: there is no such file"
        if anchor and wanted.suffix == ".md":
            assert anchor in anchors_of(wanted), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", tracked_pages(), ids=name_of)
def test_files_that_a_page_names_are_there(page):
    missing = [path for path in _PATH.findall(page.read_text()) if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing, f"there is no {missing[0]}"


def anchors_of(page: Path) -> set[str]:
    """As GitHub and MkDocs both make them of plain headings."""
    titles = re.findall(r"^#+ +(.*?)\s*$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
