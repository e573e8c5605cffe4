"""`lt-gguf flag` and what `lt-gguf inspect` then shows, as a user types them."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
from support.small_gguf import N_LAYER, write_small

from lt_gguf.calibration import Calibration
from lt_gguf.gguf.file import read_model
from lt_gguf.models.remembered import remember
from lt_gguf.report.report import Report
from lt_gguf.selection.base import Selection
from lt_gguf.spec import Provenance, StreamingSpec, Typed

RATIOS = ((0.25, 0.5, 0.75, 1.0), (0.75, 0.5, 0.75, 0.5))
MEAN = (0.5, 0.5, 0.75, 0.75)


@pytest.fixture
def plain(tmp_path) -> Path:
    return write_small(tmp_path / "plain.gguf")[0]


def write_report(path: Path, n_layer: int = N_LAYER, architecture: str = "llama") -> Path:
    spec = StreamingSpec((2, 3), n_layer, 2, 30)
    selection = Selection("lazy-ratio", spec.layers, "the laziest half", 2, 30)
    ratios = tuple((*sample, *[0.5] * (n_layer - N_LAYER)) for sample in RATIOS)
    report = Report("small", architecture, spec, selection, 0.5, 16, ratios, Calibration("text.txt", "ab" * 32, 2, 100))
    path.write_text(json.dumps(report.to_json()))
    return path


# ------------------------------------------------------------------------------------------------- flag


def test_layers(lt_gguf_command, plain, tmp_path):
    new = tmp_path / "new.gguf"
    status, out, err = lt_gguf_command("flag", plain, new, "--streaming-layers", "1,3", "--sink", 2, "--window", 40)
    assert (status, err) == (0, "")
    assert out.splitlines()[0].startswith(f"{new}: llama, ")
    assert out.splitlines()[1:] == ["2 of 4 layers stream (1,3): sink 2, window 40, prefill full"]
    model = read_model(new)
    assert (model.spec, model.provenance) == (StreamingSpec((1, 3), N_LAYER, 2, 40), Provenance("manual"))


def test_defaults_are_the_files(lt_gguf_command, plain, tmp_path):
    first, second, third = (tmp_path / f"{i}.gguf" for i in range(3))
    lt_gguf_command("flag", plain, first, "--streaming-layers", "all")
    assert read_model(first).spec == StreamingSpec(tuple(range(N_LAYER)), N_LAYER)
    lt_gguf_command("flag", first, second, "--sink", 0, "--prefill", "stream")
    assert read_model(second).spec == StreamingSpec(tuple(range(N_LAYER)), N_LAYER, sink=0, prefill="stream")
    lt_gguf_command("flag", second, third, "--streaming-layers", "0")
    assert read_model(third).spec == StreamingSpec((0,), N_LAYER, sink=0, prefill="stream")


def test_from_a_report_and_back(lt_gguf_command, plain, tmp_path):
    report, new, changed, back = (tmp_path / name for name in ("report.json", "new.gguf", "changed.gguf", "back.gguf"))
    write_report(report)
    status, out, err = lt_gguf_command("flag", plain, new, "--from", report)
    assert (status, err) == (0, "")
    model = read_model(new)
    assert model.spec == StreamingSpec((2, 3), N_LAYER, 2, 30)
    assert model.provenance.selection == "lazy-ratio" and model.provenance.lazy_ratio == MEAN
    assert json.loads(model.provenance.calibration) == Calibration("text.txt", "ab" * 32, 2, 100).describe(2, 30, 16)
    # other layers by hand: what was measured stays
    lt_gguf_command("flag", new, changed, "--streaming-layers", "0")
    assert read_model(changed).provenance == Provenance("manual", MEAN, model.provenance.calibration)
    # a window of one's own
    lt_gguf_command("flag", plain, changed, "--from", report, "--window", 99, "--overwrite")
    assert read_model(changed).spec == StreamingSpec((2, 3), N_LAYER, 2, 99)
    status, out, _ = lt_gguf_command("flag", new, back, "--off")
    assert (status, out.splitlines()[1]) == (0, "no layer streams: an ordinary model")
    assert back.read_bytes() == plain.read_bytes()


def test_a_report_of_another_architecture_is_noted(lt_gguf_command, plain, tmp_path):
    report = write_report(tmp_path / "report.json", architecture="mistral")
    status, _, err = lt_gguf_command("flag", plain, tmp_path / "new.gguf", "--from", report)
    assert status == 0
    assert err == f"note: {report} is of small (mistral), {plain} is a llama\n"


def test_in_place(lt_gguf_command, plain, tmp_path):
    new = tmp_path / "new.gguf"
    lt_gguf_command("flag", plain, new, "--streaming-layers", "1,3")
    inode = new.stat().st_ino
    status, out, err = lt_gguf_command("flag", new, "--in-place", "--window", "77")
    assert (status, err) == (0, "")
    assert (read_model(new).spec.window, new.stat().st_ino) == (77, inode)
    status, out, err = lt_gguf_command("flag", new, "--in-place", "--window", "77")
    assert (status, err) == (0, f"{new}: says that already, nothing was changed\n")
    status, out, err = lt_gguf_command("flag", new, "--in-place", "--off")
    assert (status, out) == (1, "") and err.endswith("write a new file instead\n")
    assert read_model(new).spec.window == 77


@pytest.mark.parametrize(
    "arguments, status, complaint",
    [
        (["IN", "--streaming-layers", "1"], 1, "give the file to write after it, or --in-place, and not both"),
        (["IN", "OUT", "--in-place", "--streaming-layers", "1"], 1, "and not both"),
        (["IN", "OUT", "--off", "--streaming-layers", "1"], 1, "--streaming-layers and --off: give one of them"),
        (["IN", "OUT", "--off", "--window", "9"], 1, "--off removes what --window would change"),
        (["IN", "OUT", "--streaming-layers", "4"], 1, 'layers = "4": must be "all", "none", or layers'),
        (["IN", "OUT", "--streaming-layers", "1", "--window", "0"], 1, "window = 0: must be an integer from 1"),
        (["IN", "OUT", "--streaming-layers", "1", "--sink", "-1"], 1, "sink = -1: must be an integer from 0"),
        (["IN", "OUT", "--streaming-layers", "1", "--prefill", "later"], 1, 'prefill = "later": must be "full" or "stream"'),
        (["IN", "OUT", "--from", "REPORT"], 1, "plain.gguf has 4"),
        (["IN", "OUT", "--from", "IN"], 1, "plain.gguf: is no JSON"),
        (["IN", "OUT", "--from", "none.json"], 1, "none.json: No such file or directory"),
        (["none.gguf", "OUT", "--off"], 1, "none.gguf: No such file or directory"),
        (["none.gguf", "OUT", "--streaming-layers", "1"], 1, "none.gguf: No such file or directory"),
        ([__file__, "OUT", "--off"], 1, "is not a GGUF file"),
        (["IN", "IN", "--streaming-layers", "1", "--overwrite"], 1, "is the same file as"),
        (["IN", "OUT", "--streaming-layers", "1", "--sink", "few"], 2, "(lt-gguf flag --help shows what there is)"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(lt_gguf_command, plain, tmp_path, arguments, status, complaint):
    names = {"IN": plain, "OUT": tmp_path / "new.gguf", "REPORT": write_report(tmp_path / "report.json", n_layer=6)}
    before = plain.read_bytes()
    code, out, err = lt_gguf_command("flag", *(names.get(argument, argument) for argument in arguments))
    assert (code, out, err.count("\n")) == (status, "", 1)
    assert err.startswith("error: ") and complaint in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.gguf", "report.json"]
    assert plain.read_bytes() == before


def test_architectures_that_cannot_stream(lt_gguf_command, plain, tmp_path):
    sliding, new = tmp_path / "sliding.gguf", tmp_path / "new.gguf"
    # note: as long as "llama", so that no length in the file changes
    sliding.write_bytes(plain.read_bytes().replace(b"llama", b"rwkv7"))
    status, _, err = lt_gguf_command("flag", sliding, new, "--streaming-layers", "1")
    assert status == 1 and "models of the architecture rwkv7 can't have streaming layers" in err
    assert lt_gguf_command("flag", sliding, new, "--off")[0] == 0
    assert new.read_bytes() == sliding.read_bytes()


# ---------------------------------------------------------------------------------------------- inspect


def test_inspect_shows_the_ratios_and_where_they_are_from(lt_gguf_command, plain, tmp_path):
    new = tmp_path / "new.gguf"
    lt_gguf_command("flag", plain, new, "--from", write_report(tmp_path / "report.json"))
    described = json.loads(lt_gguf_command("inspect", new, "--json")[1])
    assert [layer["lazy_ratio"] for layer in described["layers"]] == list(MEAN)
    calibration = Calibration("text.txt", "ab" * 32, 2, 100).describe(2, 30, 16)
    assert described["provenance"] == {"selection": "lazy-ratio", "calibration": calibration}
    status, out, _ = lt_gguf_command("inspect", new)
    assert status == 0
    text = " ".join(out.split())
    assert "2 layers stream, chosen by lazy-ratio: 2-3; sink 2, window 30" in text
    assert "lazy ratios measured on text.txt: 2 samples of 100 tokens, last 16 of each, sink 2, window 30" in text
    bars = [(f"{r:.4f}", "█" * round(r * 10), "░" * (10 - round(r * 10))) for r in MEAN]
    assert re.findall(r"(0\.\d{4}) (█+)(░+)", out) == bars
    assert max(map(len, out.splitlines())) <= 80


def test_inspect_without_ratios(lt_gguf_command, plain, tmp_path):
    new = tmp_path / "new.gguf"
    lt_gguf_command("flag", plain, new, "--streaming-layers", "1")
    described = json.loads(lt_gguf_command("inspect", new, "--json")[1])
    assert described["provenance"] == {"selection": "manual", "calibration": None}
    assert {layer["lazy_ratio"] for layer in described["layers"]} == {None}
    assert json.loads(lt_gguf_command("inspect", plain, "--json")[1])["provenance"] is None
    assert "lazy ratio" not in lt_gguf_command("inspect", new)[1]


def test_inspect_takes_what_others_write(lt_gguf_command, tmp_path):
    spec = StreamingSpec((1,), N_LAYER)
    odd = Provenance("[bold]mine", (math.nan, 2.0, -1.0, math.inf), "by eye")
    (path,) = write_small(tmp_path / "odd.gguf", keys=spec.to_metadata("llama") | odd.to_metadata())
    described = json.loads(lt_gguf_command("inspect", path, "--json")[1])
    assert [layer["lazy_ratio"] for layer in described["layers"]] == [None, 2.0, -1.0, None]
    assert described["provenance"]["calibration"] == "by eye"
    out = lt_gguf_command("inspect", path)[1]
    assert "chosen by [bold]mine" in out and "lazy ratios measured on by eye" in out
    short = {"lighttransfer.lazy_ratio": Typed("array of float32", [0.5])}
    (path,) = write_small(tmp_path / "short.gguf", keys=spec.to_metadata("llama") | odd.to_metadata() | short)
    status, out, _ = lt_gguf_command("inspect", path)
    assert status == 0
    assert "lighttransfer.lazy_ratio has 1 numbers, must have one for each of 4 layers: not shown" in " ".join(out.split())


@pytest.mark.parametrize("suffix, begin", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot(lt_gguf_command, plain, tmp_path, suffix, begin):
    pytest.importorskip("matplotlib")
    new, picture = tmp_path / "new.gguf", tmp_path / f"ratios.{suffix}"
    lt_gguf_command("flag", plain, new, "--from", write_report(tmp_path / "report.json"))
    status, out, err = lt_gguf_command("inspect", new, "--plot", picture, "--json")
    assert (status, err) == (0, "") and json.loads(out)
    assert picture.read_bytes().startswith(begin)


def test_plots_that_cannot_be_drawn(lt_gguf_command, plain, tmp_path, monkeypatch):
    new = tmp_path / "new.gguf"
    lt_gguf_command("flag", plain, new, "--from", write_report(tmp_path / "report.json"))
    before = sorted(tmp_path.iterdir())

    def complaint(*arguments: object) -> str:
        status, out, err = lt_gguf_command("inspect", *arguments)
        assert (status, out, err.count("\n")) == (1, "", 1)
        return err

    if "matplotlib" in sys.modules or _has_matplotlib():
        assert "has no lazy ratios to draw" in complaint(plain, "--plot", tmp_path / "a.png")
        assert "a.pdf: must end in .png or .svg" in complaint(new, "--plot", tmp_path / "a.pdf")
        assert "No such file or directory" in complaint(new, "--plot", tmp_path / "none" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "need matplotlib: pip install" in complaint(new, "--plot", tmp_path / "a.png")
    assert sorted(tmp_path.iterdir()) == before


def _has_matplotlib() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def test_a_file_that_says_nothing_gets_what_was_chosen_for_it(lt_gguf_command, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "cache"))
    spec, new = StreamingSpec((0, 3), N_LAYER, 2, 40), tmp_path / "new.gguf"
    remember(plain, spec)
    status, out, err = lt_gguf_command("flag", plain, new)
    assert status == 0 and "as it was chosen before" in err and "2 of 4 layers stream (0,3)" in out
    assert (read_model(new).spec, read_model(new).provenance.selection) == (spec, "loss")
    status, out, err = lt_gguf_command("flag", plain, new)
    assert (status, out, err) == (1, "", f"error: {new}: exists, remove it or use --overwrite\n")
    status, out, err = lt_gguf_command("flag", new, tmp_path / "other.gguf")
    assert (status, out) == (1, "") and "says already which layers stream: give --select STRATEGY" in err
