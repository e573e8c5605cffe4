"""The page's files: all that they name is there, nothing is loaded from elsewhere, and what is others' is unchanged."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess

import pytest

from lt_gguf.server.gateway import PAGE

SCRIPTS = sorted(PAGE.glob("*.js"))


def test_all_that_is_named_is_there():
    index = (PAGE / "index.html").read_text()
    named = re.findall(r'(?:src|href)="([^"#]+)"', index)
    assert named and all((PAGE / name.removeprefix("/")).is_file() for name in named), named
    for script in SCRIPTS:
        for name in re.findall(r'(?:from|import) "([^"]+)"', script.read_text()):
            assert (script.parent / name).is_file(), f"{script.name} imports {name}"


def test_nothing_comes_from_elsewhere_and_nothing_is_inline():
    """As the page's Content-Security-Policy wants it."""
    index = (PAGE / "index.html").read_text()
    assert not re.search(r'(?:src|href)="(?:https?:)?//', index) and not re.search(
        r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", index
    )
    for script in SCRIPTS:
        text = script.read_text()
        assert not re.search(r"\beval\(|new Function\(|(?:import|from) ?\(?\"https?:", text), script.name
    assert not re.search(r"url\(\s*[\"']?(?:https?:)?//|@import", (PAGE / "page.css").read_text())


def test_what_is_others_is_unchanged():
    rows = re.findall(r"^\| `([^`]+)`.*\| `([0-9a-f]{64})` \|", (PAGE / "vendor" / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 2
    for name, sha256 in rows:
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == sha256, name
    scripts = {path.name for path in (PAGE / "vendor").glob("*.js")}
    assert scripts == {name for name, _ in rows} and len(list((PAGE / "vendor").glob("*.LICENSE"))) == len(rows)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_script_is_one(script, tmp_path):
    module = tmp_path / f"{script.stem}.mjs"
    module.write_text(script.read_text())
    done = subprocess.run(["node", "--check", module], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_elements_that_are_asked_for_by_name_are_there():
    there = set(re.findall(r'\bid="([^"]+)"', (PAGE / "index.html").read_text()))
    for script in SCRIPTS:
        asked = set(re.findall(r'\$\("([^"]+)"\)', script.read_text()))
        assert asked <= there, f"{script.name}: {asked - there}"
    assert "cache-types" in there  # which panel.js fills


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_layers_that_are_kept_in_16_bits_are_named(tmp_path):
    for script in SCRIPTS:
        shutil.copy(script, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "asked.mjs").write_text("""
        import { cacheBytes, describe, fullBytes, heldByLayer } from "./layers.js";
        const info = { n_layer: 3, streaming: { layers: [1], sink: 2, window: 8, prefill: "full" }, cache_keep: [0],
          token_bytes: [8, 2, 2], streaming_token_bytes: [8, 8, 8] };
        const held = heldByLayer(info, 100);
        console.log(JSON.stringify([held.map((layer, i) => describe(layer, i, 100)), cacheBytes(info, held), fullBytes(info, 100)]));
    """)
    done = subprocess.run(["node", tmp_path / "asked.mjs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, hybrid, full = json.loads(done.stdout)
    assert said == [
        "layer 0: full, holds 100 tokens, kept in 16 bits",
        "layer 1: streaming, holds 10 of 100 tokens",
        "layer 2: full, holds 100 tokens",
    ]
    assert (hybrid, full) == (100 * 8 + 10 * 8 + 100 * 2, 100 * (8 + 2 + 2))
