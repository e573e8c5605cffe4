"""Layers that are chosen by running the converted file: what the file, the report and the card say, and what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from lt_gguf.conversion import ConversionError, convert
from lt_gguf.evaluation.runtime_bench import RuntimeBench
from lt_gguf.gguf.file import read_model
from lt_gguf.report.report import Report

DEMO = Path(__file__).parents[2] / "models" / "demo"
MEASURED = {"sink": 4, "window": 60, "samples": 1, "questions": 2, "calibration_length": 600, "w_last": 8, "device": "cpu"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path_factory.mktemp("cache")))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_kl(stories_file, tmp_path):
    steps = []
    settings = MEASURED | {"outtype": "f16", "calibration": stories_file, "select": "kl"}
    converted = convert(DEMO, tmp_path / "a.gguf", progress=lambda *step: steps.append(step), **settings)
    assert names(tmp_path) == ["a-report", "a.gguf"]
    model, report = read_model(tmp_path / "a.gguf"), Report.read(tmp_path / "a-report" / "report.json")
    n = model.n_layer
    assert model.spec == report.spec == converted.spec and len(model.spec.layers) == n // 2
    assert model.provenance.selection == report.selection.strategy == "kl"
    alone = report.selection.candidates[1:]
    assert [candidate.layers for candidate in alone] == [(il,) for il in range(n)]
    kl = {il: candidate.evidence.kl for il, candidate in enumerate(alone)}
    assert max(kl[il] for il in model.spec.layers) <= min(kl[il] for il in range(n) if il not in model.spec.layers)
    assert len(set(kl.values())) == n
    measured = report.selection.measurement
    assert (measured.data, measured.conversations, measured.sets) == ("stories.txt", 2, n + 1)
    assert report.ratios is None and names(tmp_path / "a-report") == ["README.md", "report.json", "report.md"]
    card = (tmp_path / "a-report" / "README.md").read_text()
    assert "| layer 0 | 0 | " in card and f"{n + 1} sets of layers" in card and str(tmp_path) not in card
    budget = f"Comparing loss: about {n + 1} sets of layers on 2 conversations of 600 tokens, and 0 on others"
    shown = [step[1:] for step in steps if step[0] == budget]
    assert shown[0][0] == 0 and shown[-1][0] > 0.9 * shown[-1][1] and shown == sorted(shown)


@pytest.mark.slow
def test_auto_quantized_and_split(stories_file, tmp_path):
    settings = MEASURED | {"calibration": stories_file, "select": "auto", "quantize": "Q8_0", "split_max_tensors": 40}
    settings |= {"cache_type": "q8_0/q4_0", "cache_keep": "0", "cache_breaks": "q4_0"}
    converted = convert(DEMO, tmp_path / "m.gguf", **settings)
    assert len(converted.files) > 1 and names(tmp_path) == [*(file.name for file in converted.files), "m-report"]
    model, report = read_model(converted.files[0]), Report.read(tmp_path / "m-report" / "report.json")
    assert model.provenance.selection == "auto" and model.spec == report.spec
    assert str(model.recommended) == "K q8_0, V q4_0, 16 bits in layer 0; q4_0 breaks the model"
    assert model.provenance.lazy_ratio is not None and report.ratios is not None
    candidates = report.selection.candidates
    tried = ["lazy-ratio", "frequency", "interleave-odd", "interleave-even", "kl"]
    assert [candidate.name for candidate in candidates] == ["full", *tried]
    assert model.spec.layers in [candidate.layers for candidate in candidates]
    assert {len(candidate.layers) for candidate in candidates[1:]} == {model.n_layer // 2}


@pytest.mark.slow
def test_a_dry_run_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(RuntimeBench, "measure", lambda *_: pytest.fail("measured"))
    converted = convert(DEMO, tmp_path / "a.gguf", select="kl", dry_run=True, **MEASURED)
    assert converted.spec is None and names(tmp_path) == []


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"questions": 0}, "questions = 0: must be at least 1"),
        ({"max_loss": "much"}, '--max-loss = "much": must be a share, as in 1% or 0.01'),
        ({"max_kl": -1}, "max KL = -1: must be a number of nats of at least 0"),
        ({"calibration_length": 64}, "must be more than sink . window = 64"),
        ({"calibration": Path("none.txt")}, "none.txt"),
    ],
)
def test_what_cannot_be_measured(stories_file, tmp_path, changes, complaint):
    with pytest.raises((ValueError, OSError), match=complaint) as error:
        convert(DEMO, tmp_path / "a.gguf", **MEASURED | {"select": "kl", "calibration": stories_file, "outtype": "f16"} | changes)
    assert "\n" not in str(error.value) and names(tmp_path) == []


@pytest.mark.slow
def test_nothing_is_left_of_a_measurement_that_fails(stories_file, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError("out of memory")

    monkeypatch.setattr(RuntimeBench, "measure", fail)
    with pytest.raises(ConversionError) as error:
        convert(DEMO, tmp_path / "a.gguf", select="kl", calibration=stories_file, **MEASURED)
    assert str(error.value) == f"{DEMO}: out of memory" and names(tmp_path) == []
