"""Draws how `lt-gguf chat` looks in a terminal, as an SVG file, with a real model: two questions about a text.

    python scripts/docs/draw_chat.py [OUT.svg]

The program runs in tmux, is typed to, and what then stands on its screen is drawn. The text is the tutorial's: a page of Python's
documentation, before which two facts stand.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.tmux import terminal

OUT = ROOT / "docs" / "how-to" / "chat.svg"
FACTS = "The meeting with the engineers takes place in room 417. The red lighthouse was built in the year 1874.\n"
QUESTIONS = ("In which room does the meeting with the engineers take place?", "Show a short example of a with statement in Python.")
# the half that loses least (docs/evidence/results.md), with a window that is smaller than the text
STREAMING = "layers=0-2,11-16,19,25-29;window=508"
WIDTH, HEIGHT = 124, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=OUT, metavar="OUT.svg", help="file to write (default: %(default)s)")
    out = parser.parse_args().out
    svg = drawn(screen())
    try:
        out.write_text(svg, encoding="utf-8")
    except OSError as error:
        parser.error(f"{out}: can't be written ({error.strerror})")


def screen() -> str:
    """What stands in the terminal after the questions, with its colours."""
    with tempfile.TemporaryDirectory() as name, terminal(Path(name), width=WIDTH, height=HEIGHT) as window:
        folder = Path(name)
        command = [sys.executable, "-m", "pydoc", "with"]
        text = " ".join(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        (folder / "meeting.txt").write_text(FACTS + text)
        own = {
            "LT_GGUF_DATA": name,
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
            "LANG": "C.UTF-8",
            "PATH": os.environ["PATH"],
        }
        command = [
            Path(sys.executable).parent / "lt-gguf",
            "chat",
            "smollm2",
            "meeting.txt",
            "--streaming",
            STREAMING,
            "--temp",
            0,
            "-n",
            90,
            "--cache-limit",
            0,
        ]
        window.start([*command], own)
        window.wait("%)", seconds=300)
        for number, question in enumerate(QUESTIONS, 1):
            window.type(question)
            window.keys("Enter")
            window.wait("first token after", number, seconds=300)
        window.wait("first token ", len(QUESTIONS) + 1)  # in the line below, too
        return window.screen(colours=True)


def drawn(shown: str) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere)
        console.print(Text.from_ansi(shown.rstrip("\n")), soft_wrap=True)
    svg = console.export_svg(title="lt-gguf chat", unique_id="chat")
    svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)  # which a page would load from a server
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
