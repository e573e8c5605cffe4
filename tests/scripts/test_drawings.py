"""The architecture's page and its drawing: they name the rooms that there are, and the drawing is what its script draws."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
EXPLANATION = ROOT / "docs" / "explanation"
sys.path[:0] = [str(ROOT / "scripts" / "checks"), str(ROOT / "scripts" / "docs")]

import draw_architecture
import rooms

SVG = "{http://www.w3.org/2000/svg}"
# Of an em: a letter of Verdana and of DejaVu Sans, upright or bold, is about as wide on average, and one of a monospaced font.
LETTER = {"t": 0.55, "b": 0.65, "q": 0.55, "h": 0.65, "l": 0.55, "m": 0.61, "r": 0.61}
SIZE = {"t": 12.5, "b": 13, "q": 11.5, "h": 16, "l": 11.5, "m": 11.5, "r": 11.5}


def test_the_page_has_a_line_for_each_room_in_their_order():
    page = (EXPLANATION / "architecture.md").read_text(encoding="utf-8")
    table = page.split("| room |")[1].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == rooms.ORDER


def test_files_that_the_page_names_are_there():
    page = (EXPLANATION / "architecture.md").read_text(encoding="utf-8")
    homes = [ROOT, ROOT / "lt_gguf", ROOT / "lt_gguf" / "runtime", ROOT / "lt_gguf" / "evaluation", ROOT / "ggml-patch" / "src"]
    named = {name for name in re.findall(r"`([\w./-]+\.(?:py|cpp|h|patch))`", page) if not name.startswith("tools/")}
    assert len(named) > 20
    assert [name for name in sorted(named) if not any((home / name).is_file() for home in homes)] == []


def test_the_drawing_is_what_its_script_draws():
    drawn = draw_architecture.draw()
    assert (EXPLANATION / "architecture.svg").read_text(encoding="utf-8") == drawn, "run scripts/docs/draw_architecture.py"


def test_the_drawing_has_every_room_and_no_text_that_leaves_it():
    texts = list(ElementTree.fromstring(draw_architecture.draw()).iter(f"{SVG}text"))
    assert sorted(text.text for text in texts if text.get("class") == "r") == sorted(rooms.ORDER)
    for text in texts:
        width = len(text.text or "") * LETTER[text.get("class")] * SIZE[text.get("class")]
        left = float(text.get("x")) - {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
        assert left >= 0 and left + width <= draw_architecture.WIDTH - draw_architecture.MARGIN, text.text


@pytest.mark.slow
@pytest.mark.parametrize("script", ["draw_architecture", "draw_cache"])
def test_help_is_no_file_name(script, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "docs" / f"{script}.py")]
    done = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, list(tmp_path.iterdir())) == (0, [])
    assert "OUT.svg" in done.stdout
    done = subprocess.run([*command, "nowhere/x.svg"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"{script}.py: error: nowhere/x.svg: can't be written (No such file or directory)"
