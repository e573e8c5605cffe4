"""The model card: YAML that a hub can read, whatever the names are."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lt_gguf.memory.kv import KVShape
from lt_gguf.report.model_card import KVRow, kv_rows, model_card
from lt_gguf.report.report import Report
from lt_gguf.selection import Selection
from lt_gguf.spec import StreamingSpec

SPEC = StreamingSpec((1, 3), 4, 4, 1020)
REPORT = Report("demo.gguf", "llama", SPEC, Selection("interleave-odd", (1, 3), "spread evenly", 4, 1020))


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card(tmp_path):
    file = tmp_path / "demo-Q4_K_M.gguf"
    file.write_bytes(bytes(3 << 20))
    card = model_card(REPORT, [file], "someone/Demo-1B", "apache-2.0", [KVRow(4096, 8 << 20, 5 << 20)], folder="demo-report")
    assert front_matter(card) == {
        "license": "apache-2.0",
        "base_model": "someone/Demo-1B",
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama.cpp", "lt-gguf", "lighttransfer", "long-context"],
    }
    assert "# Demo-1B, hybrid\n" in card
    assert "[someone/Demo-1B](https://huggingface.co/someone/Demo-1B)" in card
    assert "2 of 4 attention layers keep a KV cache of constant size" in card
    assert "## Streaming layers\n" in card and "Chosen by `interleave-odd`: spread evenly." in card
    assert "| 4,096 | 8.00 MiB | 5.00 MiB | 38% |" in card
    assert "- `demo-Q4_K_M.gguf`, 3.00 MiB" in card and "lt-gguf chat demo-Q4_K_M.gguf" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("name", ['we"ird: name', "- x", "a\nb", "#1"])
def test_any_name_is_yaml(name):
    assert front_matter(model_card(REPORT, [Path("a.gguf")], None, name))["license"] == name
    assert "base_model" not in front_matter(model_card(REPORT, [Path("a.gguf")], name, None))


def test_what_is_unknown_is_left_out():
    card = model_card(REPORT, [Path("a.gguf")], None, None)
    assert not {"license", "base_model"} & front_matter(card).keys()
    assert "# demo, hybrid" in card and "## Memory" not in card


def test_rows_of_memory():
    shape = KVShape((2,) * 4, 2, 64, 64)
    row = KVRow(32768, 4 * 512 * 32768, 2 * 512 * (32768 + 1536))
    assert kv_rows(shape, SPEC)[1] == kv_rows(shape, SPEC, 32768)[1] == row
    assert [row.n_ctx for row in kv_rows(shape, SPEC)] == [4096, 32768, 131072]
    assert [row.n_ctx for row in kv_rows(shape, SPEC, 40960)] == [4096, 32768, 40960]
    assert [row.n_ctx for row in kv_rows(shape, SPEC, 2048)] == [2048]
