"""`lt-gguf analyze`: the lazy layers of a GGUF file and of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from support.tiny_checkpoint import N_LAYER, hybrid_file  # noqa: F401 - a fixture

import lt_gguf
from lt_gguf.calibration import Calibration
from lt_gguf.report import plots, tables
from lt_gguf.report.folder import FILES
from lt_gguf.report.report import Report
from lt_gguf.spec import StreamingSpec

DEMO = Path(__file__).parents[2] / "models" / "demo"
QUICK = ["--threads", "1", "--batch-size", "64"]
SMALL = ["--samples", "3", "--calibration-length", "200", "--sink", "2", "--window", "40", "--w-last", "16"]

NOT_MEASURED = tables.NOT_MEASURED + "\n"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """An analysis of a checkpoint leaves its ratios in the user's cache folder."""
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def command(lt_gguf_command):
    """The same for `lt-gguf analyze`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        """By lazy ratios, unless the arguments say how to choose: the model is too small to be asked anything."""
        chooses = {"--select", "--streaming-layers", "--threshold"} & {*map(str, arguments)}
        return lt_gguf_command("analyze", *arguments, *QUICK, *([] if chooses else ["--select", "lazy-ratio"]))

    return run


@pytest.fixture
def analyze(command, hybrid_file):
    """The same for a hybrid file."""
    return lambda *arguments: command(hybrid_file, *arguments)


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory):
    """The demo model as a GGUF file: its layers differ, and its tokenizer is complete."""
    from lt_gguf.conversion import convert

    settings = {"outtype": "f32", "select": "interleave-odd", "no_report": True}
    return convert(DEMO, tmp_path_factory.mktemp("demo") / "demo.gguf", **settings).files[0]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "calibration.txt"
    path.write_text("".join(f"line {i} of the quick brown fox, öäü\n" for i in range(200)))
    return path


@pytest.mark.slow
def test_a_report_of_a_gguf_file(analyze, hybrid_file, text, tmp_path):
    status, out, err = analyze("--calibration", text, *SMALL, "--out", tmp_path / "report")
    assert (status, err) == (0, NOT_MEASURED)
    names = {name for name in FILES if not name.startswith("loss")}  # nothing was measured of the hybrid
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    written = json.loads((tmp_path / "report" / "report.json").read_text())

    settings = {"n_ctx": 64, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}
    llm = lt_gguf.Llama(str(hybrid_file), **settings)
    content = text.read_text()
    stride = len(content) // 3
    parts = [[1] + llm.tokenize(content[i * stride : (i + 1) * stride].encode(), add_bos=False)[:199] for i in range(3)]
    expected = np.array([llm.lazy_ratios(part, 2, 40, 16) for part in parts])
    np.testing.assert_allclose(written["lazy_ratio_by_sample"], expected, atol=1e-5)
    np.testing.assert_allclose(written["lazy_ratio"], expected.mean(axis=0), atol=1e-5)
    assert written["streaming_layers"] == sorted(np.argsort(expected.mean(axis=0), kind="stable")[-2:].tolist())

    assert written["strategy"] == "lazy-ratio" and written["fraction"] == 0.5 and written["prefill"] == "full"
    assert (written["sink"], written["window"], written["w_last"]) == (2, 40, 16)
    assert written["model"] == hybrid_file.name and written["architecture"] == "llama"
    sha256 = hashlib.sha256(text.read_bytes()).hexdigest()
    assert written["calibration"] == Calibration("calibration.txt", sha256, 3, 200).describe(2, 40, 16)
    spec = StreamingSpec(tuple(written["streaming_layers"]), N_LAYER, 2, 40, "full")
    assert written["streaming"] == str(spec)

    lines = out.splitlines()
    assert [il for il in range(N_LAYER) if lines[1 + il].rstrip().endswith("streams")] == list(spec.layers)
    assert f"{written['lazy_ratio'][0]:.4f}" in lines[1]
    assert f"lazy-ratio: {written['reason']}" in lines
    assert f'--streaming "{spec}"' in lines
    assert str(tmp_path) not in (tmp_path / "report" / "report.json").read_text()


@pytest.mark.slow
def test_a_checkpoint_has_the_ratios_of_the_file_that_is_made_from_it(command, demo_file, text, tmp_path):
    reports = []
    for model, device in ((DEMO, ["--device", "cpu"]), (demo_file, ["--cache-type", "f32", "--no-flash-attn"])):
        folder = tmp_path / model.name
        status, _out, err = command(model, *device, "--calibration", text, *SMALL, "--out", folder)
        assert (status, err) == (0, NOT_MEASURED)
        reports.append(Report.read(folder / "report.json"))
    of_checkpoint, of_file = reports
    np.testing.assert_allclose(of_checkpoint.ratios, of_file.ratios, rtol=0, atol=5e-5)
    assert of_checkpoint.spec == of_file.spec and of_checkpoint.calibration == of_file.calibration
    assert (of_checkpoint.model, of_checkpoint.architecture) == ("demo", "llama")


def test_without_out_nothing_is_written(analyze, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = analyze("--calibration", text, *SMALL)
    assert (status, err) == (0, NOT_MEASURED) and "--streaming" in out
    assert list(tmp_path.iterdir()) == [text]


def test_the_built_in_texts_and_the_models_context(analyze, tmp_path):
    assert analyze("--samples", 1, "--out", tmp_path / "report")[0] == 0
    report = Report.read(tmp_path / "report" / "report.json")
    assert report.calibration.data.startswith("texts of Python") and report.calibration.length == 2048


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, layers",
    [
        (["--streaming-fraction", 0], ()),
        (["--streaming-fraction", 1], (0, 1, 2, 3)),
        (["--select", "interleave-even"], (0, 2)),
        (["--streaming-layers", "1,3"], (1, 3)),
        (["--threshold", "0"], (0, 1, 2, 3)),
        (["--select", "frequency", "--streaming-fraction", 0.25], None),
    ],
)
def test_strategies(analyze, text, tmp_path, options, layers):
    assert analyze("--calibration", text, *SMALL, *options, "--out", tmp_path / "report")[0] == 0
    report = Report.read(tmp_path / "report" / "report.json")
    assert report.ratios is not None  # measured whatever chooses
    assert len(report.spec.layers) == 1 if layers is None else report.spec.layers == layers


def test_a_preset_is_measured_with_its_own_sinks_and_window(analyze, text, tmp_path, monkeypatch):
    from lt_gguf.selection import preset

    tiny = preset.Checkpoint(("llama",), N_LAYER, "2", 3, 50, "here")
    monkeypatch.setattr(preset, "PRESETS", {"QwQ-32B-LightTransfer": tiny})
    name = "preset:QwQ-32B-LightTransfer"
    assert analyze("--calibration", text, *SMALL, "--select", name, "--out", tmp_path / "report")[0] == 0
    report = Report.read(tmp_path / "report" / "report.json")
    assert str(report.spec) == "layers=2;sink=3;window=50;prefill=stream" and report.fraction is None
    assert json.loads(report.provenance.calibration)["w_recent"] == 50


def test_a_report_is_not_overwritten_unasked(analyze, text, tmp_path):
    arguments = ["--calibration", text, *SMALL, "--out", tmp_path / "report"]
    assert analyze(*arguments)[0] == 0
    status, out, err = analyze(*arguments)
    assert (status, out) == (1, "") and "report.json: exists, remove it, name another folder or use --overwrite" in err
    assert analyze(*arguments, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--calibration", "none.txt", *SMALL], "none.txt: No such file or directory"),
        (["--calibration", "BINARY", *SMALL], "is not UTF-8, see byte 3"),
        (["--calibration", "TEXT", *SMALL, "--samples", "3000"], "tokens, must have 199 for samples of 200"),
        (["--calibration", "TEXT", *SMALL, "--samples", "0"], "samples = 0: must be at least 1"),
        (["--calibration", "TEXT", *SMALL, "--calibration-length", "42"], "length = 42: must be more than sink + window = 42"),
        (
            ["--calibration", "TEXT", *SMALL, "--samples", "1", "--calibration-length", "3000"],
            "must have at most the model's context of 2048",
        ),
        (["--calibration", "TEXT", *SMALL, "--w-last", "0"], "w_last = 0: must be an integer from 1"),
        (["--calibration", "TEXT", *SMALL, "--streaming-fraction", "1.5"], "fraction = 1.5: must be a number from 0 to 1"),
        ([*SMALL, "--out", "TEXT"], "calibration.txt: is a file, must be a folder for the report"),
        ([*SMALL, "--select", "best"], 'selection = "best": must be one of loss, lazy-ratio, frequency, '),
        ([*SMALL, "--select", "preset"], "selection preset: tiny llama isn't recognised"),
        ([*SMALL, "--select", "lazy-ratio", "--streaming-layers", "1"], "must not be given --streaming-layers"),
        ([*SMALL, "--streaming-layers", "4"], 'layers = "4": must be "all", "none", or layers'),
        ([*SMALL, "--device", "cpu"], "--device and --dtype are for checkpoints"),
    ],
)
def test_an_error_is_one_line(analyze, text, tmp_path, arguments, complaint):
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"abc\xff")
    files = {"TEXT": text, "BINARY": binary}
    status, out, err = analyze(*(files.get(argument, argument) for argument in arguments))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ") and complaint.lower() in err.lower()


def test_what_is_no_model(command, tmp_path):
    for model, complaint in (
        ("none.gguf", "none.gguf: No such file or directory"),
        ("no folder", "no folder: there is no such file and no model of that name, must be the folder of a checkpoint"),
        (tmp_path, "has no config.json"),
    ):
        status, out, err = command(model)
        assert (status, out, err.count("\n")) == (1, "", 1) and complaint in err


def test_a_missing_matplotlib_is_said_before_anything_is_measured(analyze, tmp_path, monkeypatch):
    def check() -> None:
        raise ImportError("pictures need matplotlib: pip install 'lt-gguf[plot]'")

    monkeypatch.setattr(plots, "check", check)
    status, out, err = analyze(*SMALL, "--out", tmp_path / "report")
    assert (status, out) == (1, "") and "pictures need matplotlib" in err
    assert list(tmp_path.iterdir()) == []
