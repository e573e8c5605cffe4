"""The report: an exact round trip, one line for each thing that is wrong in a file, and never half a report."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_gguf.calibration import Calibration
from lt_gguf.gguf import unfinished
from lt_gguf.report import plots
from lt_gguf.report.folder import FILES, check_destination, write_report
from lt_gguf.report.model_card import streaming_section
from lt_gguf.report.report import Report
from lt_gguf.selection import Selection
from lt_gguf.spec import Provenance, StreamingSpec

NAN = math.nan
CALIBRATION = Calibration("book.txt", "0123456789abcdef", 2, 100)
RATIOS = ((0.1, 0.7, NAN, 1 / 3), (0.3, 0.9, NAN, 2 / 3))


def make(ratios=RATIOS, layers=(1,), prefill="full", **changes) -> Report:
    n_layer = len(ratios[0]) if ratios else 4
    settings = {"fraction": 0.5, "w_last": 16, "calibration": CALIBRATION} if ratios else {}
    selection = Selection("lazy-ratio", layers, "it is *lazy*", 2, 40)
    spec = StreamingSpec(layers, n_layer, 2, 40, prefill)
    return Report("tiny.gguf", "llama", spec, selection, ratios=ratios, **settings | changes)


def by_hand() -> Report:
    return make(None, fraction=None)


def same(one: Report, other: Report) -> bool:
    """Equal, NaN included: by what is printed of every float, which is exact."""
    return repr(one) == repr(other)


# ------------------------------------------------------------------------------------------------- JSON


def test_what_is_in_it():
    content = make().to_json()
    assert content == {
        "version": 1,
        "model": "tiny.gguf",
        "architecture": "llama",
        "n_layer": 4,
        "strategy": "lazy-ratio",
        "reason": "it is *lazy*",
        "warning": None,
        "fraction": 0.5,
        "streaming_layers": [1],
        "sink": 2,
        "window": 40,
        "prefill": "full",
        "streaming": "layers=1;sink=2;window=40;prefill=full",
        "w_last": 16,
        "lazy_ratio": [0.2, 0.8, None, 0.5],
        "lazy_ratio_by_sample": [[0.1, 0.7, None, 1 / 3], [0.3, 0.9, None, 2 / 3]],
        "calibration": {
            "data": "book.txt",
            "sha256": "0123456789abcdef",
            "samples": 2,
            "length": 100,
            "tokens": 200,
            "w_last": 16,
            "w_sink": 2,
            "w_recent": 40,
        },
        "candidates": None,
        "measurement": None,
        "cache_types": None,
    }


def test_what_a_gguf_file_says_of_it():
    provenance = make().provenance
    assert provenance.selection == "lazy-ratio"
    np.testing.assert_array_equal(provenance.lazy_ratio, [0.2, 0.8, NAN, 0.5])
    assert json.loads(provenance.calibration) == make().to_json()["calibration"]
    assert by_hand().provenance == Provenance("lazy-ratio", None, None)


def test_layers_that_were_not_measured_at_the_end():
    report = make(((0.25, 0.5),), (1,), w_last=1, calibration=None)
    assert report.spec.n_layer == 2
    padded = Report("m", "llama", StreamingSpec((1,), 3, 2, 40), report.selection, ratios=((0.25, 0.5),))
    np.testing.assert_array_equal(padded.mean_ratios, [0.25, 0.5, NAN])
    assert padded.to_json()["lazy_ratio"] == [0.25, 0.5, None]


@given(
    n_layer=st.integers(1, 6),
    n_samples=st.integers(1, 4),
    prefill=st.sampled_from(["full", "stream"]),
    data=st.data(),
)
def test_the_round_trip_is_exact(n_layer, n_samples, prefill, data):
    ratio = st.floats(0, 1)
    layers = tuple(sorted(data.draw(st.sets(st.integers(0, n_layer - 1)))))
    unmeasured = data.draw(st.sets(st.integers(0, n_layer - 1)))
    ratios = tuple(tuple(NAN if il in unmeasured else data.draw(ratio) for il in range(n_layer)) for _ in range(n_samples))
    report = make(ratios, layers, prefill)
    assert same(Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))), report)


def test_the_round_trip_without_ratios():
    assert same(Report.from_json(json.loads(json.dumps(by_hand().to_json()))), by_hand())


REMOVED = object()


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("version", REMOVED, "version = null: must be 1, in a report of lt-gguf"),
        ("version", 2, "version = 2: must be 1"),
        ("model", 3, "model = 3: must be a string"),
        ("architecture", REMOVED, "architecture: is missing, must be a string"),
        ("n_layer", "4", 'n_layer = "4": must be an integer'),
        ("n_layer", 3, "lazy_ratio_by_sample = .*: must be null, or for each sample a list of 3 numbers"),
        ("n_layer", 1, 'layers = "1": must be'),
        ("n_layer", True, "n_layer = true: must be an integer"),
        ("streaming_layers", [1.0], "streaming_layers = .1.0.: must be a list of layers"),
        ("streaming_layers", [2], "streaming = .*: contradicts the other keys, which say .*layers=2;"),
        ("streaming_layers", "1", "streaming_layers = .*: must be a list of layers"),
        ("sink", -1, "sink = -1: must be an integer from 0"),
        ("window", 0, "window = 0: must be an integer from 1"),
        ("window", None, "window = null: must be an integer"),
        ("prefill", "fully", 'prefill = "fully": must be "full" or "stream"'),
        ("reason", REMOVED, "reason: is missing"),
        ("fraction", 2, "fraction = 2: must be a number from 0 to 1, or null"),
        ("w_last", 0, "w_last = 0: must be an integer of at least 1, or null"),
        ("w_last", None, "has a calibration, must have lazy ratios and w_last too"),
        ("lazy_ratio", [0.1] * 4, "lazy_ratio: must be the mean of lazy_ratio_by_sample"),
        ("lazy_ratio", [0.2, 0.8, None, 0.5001], "lazy_ratio: must be the mean of lazy_ratio_by_sample"),
        ("lazy_ratio", None, "lazy_ratio: must be the mean of lazy_ratio_by_sample"),
        ("lazy_ratio_by_sample", [], "lazy_ratio_by_sample = ..: must be null, or for each sample"),
        ("lazy_ratio_by_sample", [[0.1, 0.7, None]], "lazy_ratio_by_sample"),
        ("lazy_ratio_by_sample", [[0.1, 0.7, None, 1.5]], "lazy_ratio_by_sample"),
        ("lazy_ratio_by_sample", [[0.1, 0.7, None, NAN]], "lazy_ratio_by_sample"),
        ("lazy_ratio_by_sample", [[0.1, 0.7, None, 0.5], [0.3, 0.9, 0.1, 0.5]], "layer 2 was measured in 1 of 2 samples"),
        ("calibration", "book", "calibration = .book.: must be an object, or null"),
        ("calibration", {"data": "b"}, "sha256: is missing"),
        ("calibration", {"data": "b", "sha256": "", "samples": 0, "length": 1}, "samples = 0: must be an integer of at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, key, value, complaint):
    content = make().to_json() | {key: value}
    if value is REMOVED:
        del content[key]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        Report.read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and re.search(complaint, message) and "\n" not in message


@pytest.mark.parametrize(
    "content, complaint", [(b"{", "is no JSON"), (b"\xff\xfe\x01", "is no JSON"), (b"[]", "is no JSON object")]
)
def test_what_is_no_report(tmp_path, content, complaint):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        Report.read(tmp_path / "report.json")
    with pytest.raises(FileNotFoundError):
        Report.read(tmp_path / "none.json")


def test_parts_that_contradict_each_other():
    selection = Selection("manual", (1,), "by hand", 2, 40)
    for spec in (StreamingSpec((2,), 4, 2, 40), StreamingSpec((1,), 4, 3, 40), StreamingSpec((1,), 4, 2, 41)):
        with pytest.raises(ValueError, match="the selection is not what streams"):
            Report("m", "llama", spec, selection)
    with pytest.raises(ValueError, match="lazy ratios: are of 5 layers, the model has 4"):
        Report("m", "llama", StreamingSpec((1,), 4, 2, 40), selection, ratios=((0.5,) * 5,))


# ------------------------------------------------------------------------------------------------- files


def test_files(tmp_path):
    folder = tmp_path / "made" / "report"
    written = write_report(make(), folder)
    names = [name for name in FILES if not name.startswith("loss")]  # nothing was measured of the hybrid
    assert [path.name for path in written] == names and all(path.parent == folder for path in written)
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert [path.name for path in folder.parent.iterdir()] == ["report"]
    assert same(Report.read(folder / "report.json"), make())
    assert (folder / "report.md").read_text() == streaming_section(make())
    assert folder.stat().st_mode == folder.parent.stat().st_mode  # as readable as any folder


def test_without_ratios_there_are_no_pictures(tmp_path):
    assert [path.name for path in write_report(by_hand(), tmp_path)] == ["report.md", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_nothing_is_overwritten_unasked(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_report(make(), tmp_path)  # a folder with other files is fine
    with pytest.raises(ValueError, match=r"report.json: exists, remove it, name another folder or use --overwrite"):
        write_report(by_hand(), tmp_path)
    assert same(Report.read(tmp_path / "report.json"), make())
    write_report(by_hand(), tmp_path, overwrite=True)
    # no picture of an older report beside a new one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "report.json", "report.md"]
    with pytest.raises(ValueError, match="notes.txt: is a file, must be a folder for the report"):
        check_destination(tmp_path / "notes.txt", True)


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fails_at", ["save", "to_json"])
def test_no_half_written_report(tmp_path, monkeypatch, existing, fails_at):
    folder = tmp_path / "report"
    if existing:
        write_report(by_hand(), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if existing else None

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots if fails_at == "save" else Report, fails_at, fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(make(), folder, overwrite=True)
    if existing:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["report"]
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existing", [False, True])
def test_what_a_killed_process_has_left_goes(tmp_path, existing):
    folder = tmp_path / "report"
    if existing:
        write_report(by_hand(), folder)
    with pytest.MonkeyPatch.context() as patch:
        # as a process that is killed: nothing is tidied up, and its lock goes
        patch.setattr(unfinished.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(Report, "to_json", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_report(by_hand(), folder, overwrite=True)
    assert list((folder if existing else tmp_path).glob(".report.*"))
    write_report(by_hand(), folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.md"]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


# --------------------------------------------------------------------------------------------- the section


def test_the_section_for_a_model_card():
    text = streaming_section(make())
    assert text.startswith("## Streaming layers\n\n1 of 4 layers stream (1): there a token sees the first 2 tokens and the last")
    assert r"Chosen by `lazy-ratio`: it is \*lazy\*." in text
    assert "sink 2, window 40, last 16 tokens of each of 2 samples of 100 tokens (book.txt, sha256 0123456789ab)" in text
    assert "(lazy_ratio.png)" in text and "(lazy_ratio_by_sample.png)" in text
    assert "| 1 | 0.8000 | streams |" in text and "| 2 | not measured |  |" in text and "| 0 | 0.2000 |  |" in text
    assert "(model-report/lazy_ratio.png)" in streaming_section(make(), "model-report/")
    assert "png" not in streaming_section(by_hand())
    assert "0 of 4 layers stream: " in streaming_section(make(layers=()))
    assert "while a prompt is read, too" in streaming_section(make(prefill="stream"))
