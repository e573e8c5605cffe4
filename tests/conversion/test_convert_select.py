"""Conversions that measure or count: the lazy layers of a checkpoint, its report and card, and KV budgets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.tiny_checkpoint import N_LAYER, write_checkpoint

from lt_gguf.conversion import ConversionError, convert
from lt_gguf.gguf.file import read_model
from lt_gguf.memory.kv import kv_memory
from lt_gguf.report.report import Report
from lt_gguf.selection import laziest

MEASURED = {"sink": 2, "window": 30, "samples": 2, "calibration_length": 128, "w_last": 8, "outtype": "f32", "select": "lazy-ratio"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text("the quick brown fox jumps over the lazy dog and runs away " * 100)
    return file


@pytest.mark.slow
def test_measured_layers_their_report_and_their_card(llama, text, tmp_path):
    steps = []
    options = MEASURED | {"calibration": text, "fraction": 0.25}
    converted = convert(llama, tmp_path / "m.gguf", progress=lambda *step: steps.append(step), **options)
    folder = tmp_path / "m-report"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-report", "m.gguf"]
    assert converted.report_folder == folder
    model = read_model(tmp_path / "m.gguf")
    report = Report.read(folder / "report.json")
    assert model.spec == converted.spec == report.spec
    ratios = model.provenance.lazy_ratio
    assert all(0 < ratio < 1 for ratio in ratios) and len(set(ratios)) == N_LAYER
    assert model.spec.layers == laziest(ratios, 1)
    assert model.provenance.selection == "lazy-ratio" == report.selection.strategy
    assert np.allclose(report.mean_ratios, ratios, atol=1e-7)
    calibration = json.loads(model.provenance.calibration)
    assert calibration == report.to_json()["calibration"]
    expected = {"data": "book.txt", "samples": 2, "length": 128, "tokens": 256, "w_last": 8, "w_sink": 2, "w_recent": 30}
    assert {key: calibration[key] for key in expected} == expected
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and 'license: "apache-2.0"' in card and "`m.gguf`" in card
    assert str(tmp_path) not in card + (folder / "report.json").read_text() + (folder / "report.md").read_text()
    measuring = [step for step in steps if step[0].startswith("Measuring")]
    assert measuring[-1][1] == measuring[-1][2] > 0


@pytest.mark.slow
def test_an_existing_report_is_kept(llama, text, tmp_path):
    (tmp_path / "m-report").mkdir()
    mine = tmp_path / "m-report" / "report.json"
    mine.write_text("mine")
    options = MEASURED | {"calibration": text}
    with pytest.raises((ValueError, OSError), match="report.json: exists"):
        convert(llama, tmp_path / "m.gguf", **options)
    assert mine.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["m-report"]
    convert(llama, tmp_path / "m.gguf", overwrite=True, report=tmp_path / "there", **options)
    assert mine.read_text() == "mine" and (tmp_path / "there" / "README.md").exists()


@pytest.mark.slow
def test_what_cannot_be_measured(llama, text, tmp_path):
    sliding = write_checkpoint(tmp_path / "mistral", "mistral", sliding_window=64)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    before = sorted(path.name for path in tmp_path.iterdir())
    for model, options, complaint in (
        (sliding, {}, "sliding window"),
        (llama, {"calibration": short}, "short.txt: .*give a longer text"),
        (llama, {"calibration_length": 32}, "must be more than sink . window = 32"),
        (llama, {"device": "abacus"}, "abacus"),
        (llama, {"dtype": "int3"}, "int3"),
    ):
        with pytest.raises(ValueError, match=complaint) as error:
            convert(model, tmp_path / "m.gguf", **MEASURED | {"calibration": text} | options)
        assert "\n" not in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_budget_picks_the_smallest_number(llama, tmp_path):
    n_ctx, options = 4096, {"sink": 2, "window": 30, "select": "interleave-odd", "outtype": "f32", "prefill": "stream"}
    full = N_LAYER * 2 * 2 * 16 * 2 * n_ctx
    converted = convert(llama, tmp_path / "a.gguf", kv_budget=str(full * 3 // 4), ctx=n_ctx, **options)
    assert len(converted.spec.layers) == 2  # with one it would be more than 3/4, a streaming layer isn't free
    assert "2 is the smallest number" in converted.selection.reason
    model = read_model(tmp_path / "a.gguf")
    assert kv_memory(model.kv_shape, model.spec, n_ctx).total <= full * 3 // 4
    with pytest.raises(ConversionError, match="llama: .*however many of 4 layers stream.*must be at least that"):
        convert(llama, tmp_path / "b.gguf", kv_budget="1KiB", ctx=n_ctx, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.slow
def test_an_impossible_budget_is_known_before_anything_is_measured(llama, text, tmp_path, monkeypatch):
    from lt_gguf.hf import analysis

    monkeypatch.setattr(analysis, "measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ConversionError, match="however many of 4 layers stream"):
        convert(llama, tmp_path / "a.gguf", calibration=text, kv_budget="1KiB", ctx=4096, **MEASURED)
