"""`lt-gguf analyze --select kl`, `lt-gguf flag --select kl`: layers chosen by running a GGUF file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

import lt_gguf
from lt_gguf import analysis, calibration
from lt_gguf.analysis import choose
from lt_gguf.evaluation.runtime_bench import RuntimeBench
from lt_gguf.gguf.file import read_model
from lt_gguf.models.remembered import recall
from lt_gguf.report.report import Report
from lt_gguf.report.tables import NOT_MEASURED

DEMO = Path(__file__).parents[2] / "models" / "demo"
SMALL = ["--samples", 1, "--questions", 2, "--calibration-length", 600, "--window", 60, "--threads", 1]


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory) -> Path:
    from lt_gguf.conversion import convert

    settings = {"outtype": "f16", "layers": "none", "window": 60, "prefill": "stream"}
    return convert(DEMO, tmp_path_factory.mktemp("demo") / "demo.gguf", **settings).files[0]


@pytest.mark.slow
def test_analyze(lt_gguf_command, demo_file, stories_file, tmp_path):
    n = read_model(demo_file).n_layer
    command = ["analyze", demo_file, *SMALL, "--calibration", stories_file, "--prefill", "stream", "--select"]
    status, out, err = lt_gguf_command(*command, "kl", "--out", tmp_path / "report")
    assert status == 0 and err.splitlines() == [
        f"loss: about {n + 1} sets of layers on 2 conversations of 600 tokens, and 0 on others",
        NOT_MEASURED,  # of all together
    ]
    report = Report.read(tmp_path / "report" / "report.json")
    assert report.selection.strategy == "kl" and report.ratios is not None and report.spec.prefill == "stream"
    lines = (line.split() for line in out.splitlines())
    rows = [words for words in lines if words[:1] == ["layer"] and words[1].isdigit()]
    assert [row[1] for row in rows] == [str(il) for il in range(n)]
    kl = [sum(map(float, row[3:6])) / 3 for row in rows]
    np.testing.assert_allclose(kl, [c.evidence.kl for c in report.selection.candidates[1:]], atol=1e-4)
    assert f'--streaming "{report.spec}"' in out and f"kl: {report.selection.reason}" in out
    assert f"measured on {report.selection.measurement}" in out
    # what was found can be written into the file
    assert lt_gguf_command("flag", demo_file, tmp_path / "new.gguf", "--from", tmp_path / "report" / "report.json")[0] == 0
    assert read_model(tmp_path / "new.gguf").spec == report.spec
    assert read_model(tmp_path / "new.gguf").provenance.selection == "kl"


@pytest.mark.slow
def test_analyze_has_other_layers_for_another_prefill(lt_gguf_command, demo_file, stories_file, tmp_path):
    found = []
    for prefill in ("full", "stream"):
        command = ["analyze", demo_file, *SMALL, "--calibration", stories_file, "--select", "kl", "--prefill", prefill]
        assert lt_gguf_command(*command, "--out", tmp_path / prefill)[0] == 0
        found.append(Report.read(tmp_path / prefill / "report.json").selection.candidates)
    # streaming while the prompt is read costs more
    assert sum(c.evidence.kl for c in found[0]) < sum(c.evidence.kl for c in found[1])


@pytest.mark.slow
def test_flag(lt_gguf_command, demo_file, stories_file, tmp_path, monkeypatch):
    small = partial(analysis.Settings, samples=1, questions=2, length=600, calibration=stories_file)
    monkeypatch.setattr(analysis, "Settings", small)
    new = tmp_path / "new.gguf"
    status, out, err = lt_gguf_command("flag", demo_file, new, "--select", "kl", "--sink", 2)
    assert status == 0 and err.startswith("loss: about")
    model = read_model(new)
    assert (model.spec.sink, model.spec.window, model.spec.prefill) == (2, 60, "stream")
    assert len(model.spec.layers) == model.n_layer // 2
    assert (model.provenance.selection, model.provenance.lazy_ratio) == ("kl", None)
    assert f'--streaming "{model.spec}"' in out
    # before anything is measured
    monkeypatch.setattr(analysis, "analyze", lambda *_: pytest.fail("measured"))
    status, out, err = lt_gguf_command("flag", demo_file, new, "--select", "kl")
    assert (status, out, err) == (1, "", f"error: {new}: exists, remove it or use --overwrite\n")


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(lt_gguf_command, demo_file, stories_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "cache"))
    measure = RuntimeBench._measure

    def interrupted(bench: RuntimeBench, sets: list) -> None:
        if bench.sets:
            raise KeyboardInterrupt
        measure(bench, sets)

    command = ["analyze", demo_file, *SMALL, "--calibration", stories_file, "--select", "kl", "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(RuntimeBench, "_measure", interrupted)
        status, out, err = lt_gguf_command(*command)
    assert (status, out) == (130, "") and err.splitlines()[1:] == [
        "interrupted: what was measured is kept, the same command goes on"
    ]
    (kept,) = (tmp_path / "cache" / "measured").iterdir()
    before = kept.read_bytes()
    assert not (tmp_path / "out").exists() and lt_gguf_command(*command)[0] == 0
    assert kept.read_bytes().startswith(before) and kept.read_bytes() != before


@pytest.mark.slow
def test_flag_measures_loss_where_nothing_is_said(lt_gguf_command, demo_file, stories_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "cache"))
    small = partial(analysis.Settings, samples=1, questions=2, length=600, calibration=stories_file)
    monkeypatch.setattr(analysis, "Settings", small)
    plain, new = tmp_path / "plain.gguf", tmp_path / "new.gguf"
    assert lt_gguf_command("flag", demo_file, plain, "--off")[0] == 0
    status, _, err = lt_gguf_command("flag", plain, new, "--window", 60)
    assert status == 0 and err.startswith("loss: about")
    model = read_model(new)
    assert 0 < len(model.spec.layers) < model.n_layer and (model.spec.window, model.provenance.selection) == (60, "loss")
    assert recall(plain) == model.spec


def test_flag_by_a_strategy_that_measures_nothing(lt_gguf_command, demo_file, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "read_texts", lambda *_: pytest.fail("measured"))
    assert lt_gguf_command("flag", demo_file, tmp_path / "new.gguf", "--select", "interleave-odd")[0] == 0
    model = read_model(tmp_path / "new.gguf")
    assert model.spec.layers == tuple(range(1, model.n_layer, 2)) and model.provenance.selection == "interleave-odd"


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["analyze", DEMO, "--select", "kl"], "selection kl: runs the hybrid itself, must be asked of a GGUF file: "),
        (["analyze", "FILE", "--questions", 0], "questions = 0: must be at least 1"),
        (["analyze", "FILE", "--prefill", "later"], 'prefill = "later": must be "full" or "stream"'),
        (["flag", "FILE", "OUT", "--select", "worst"], 'selection = "worst": must be one of loss, lazy-ratio, '),
        (["flag", "FILE", "OUT", "--select", "manual"], "selection manual: needs --streaming-layers"),
        (["flag", "FILE", "OUT", "--select", "kl", "--off"], "--select and --off: give one of them"),
    ],
)
def test_an_error_is_one_line(lt_gguf_command, demo_file, tmp_path, arguments, complaint):
    files = {"FILE": demo_file, "OUT": tmp_path / "new.gguf"}
    status, out, err = lt_gguf_command(*(files.get(argument, argument) for argument in arguments))
    assert (status, out, err.count("\n")) == (1, "", 1) and complaint in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_was_measured_once_is_used(lt_gguf_command, demo_file, stories_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "cache"))
    plain = tmp_path / "plain.gguf"
    assert lt_gguf_command("flag", demo_file, plain, "--off")[0] == 0
    how = {"samples": 1, "questions": 2, "length": 600, "calibration": stories_file, "window": 60, "n_threads": 1}
    spec = lt_gguf.choose_streaming(plain, **how)
    assert 0 < len(spec.layers) < spec.n_layer and spec.window == 60
    assert lt_gguf.Llama(plain, streaming="auto", n_ctx=256, n_threads=1, verbose=False).streaming == spec
    monkeypatch.setattr(choose, "analyze", lambda *_: pytest.fail("measured"))
    assert lt_gguf.choose_streaming(plain) == lt_gguf.choose_streaming(plain, window=60, sink=4) == spec
    with pytest.raises(pytest.fail.Exception, match="measured"):
        lt_gguf.choose_streaming(plain, window=80)


@pytest.mark.slow
def test_analyze_is_remembered_unless_a_number_was_asked_for(lt_gguf_command, demo_file, stories_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "cache"))
    plain = tmp_path / "plain.gguf"
    assert lt_gguf_command("flag", demo_file, plain, "--off")[0] == 0
    command = ["analyze", plain, *SMALL, "--calibration", stories_file]
    status, out, _ = lt_gguf_command(*command, "--streaming-fraction", 1)
    assert status == 0 and recall(plain) is None and "--streaming auto" not in out
    status, out, _ = lt_gguf_command(*command)
    assert status == 0 and f"lt-gguf chat {plain} --streaming auto" in out
    assert f'--streaming "{recall(plain)}"' in out
