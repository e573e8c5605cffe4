"""Checkpoints that were trained to stream: the converter takes their layers from config.json."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_checkpoint import N_LAYER, write_checkpoint

from lt_gguf.conversion import convert
from lt_gguf.conversion.options import Options
from lt_gguf.gguf.file import read_model
from lt_gguf.selection import Model, Request
from lt_gguf.selection.trained import Trained
from lt_gguf.spec import Provenance, StreamingSpec
from lt_gguf.spec.in_config import KEY, read_spec

SCRIPT = Path(__file__).parents[2] / "convert" / "hf_to_gguf_lt.py"
CALIBRATION = {"data": "chats.jsonl", "sha256": "0" * 64, "samples": 3, "length": 90, "tokens": 200}
SPEC = StreamingSpec((0, 3), N_LAYER, sink=3, window=17, prefill="stream")
CONTENT = {
    "version": 1,
    "layers": [0, 3],
    "sink": 3,
    "window": 17,
    "prefill": "stream",
    "selection": "frequency",
    "lazy_ratio": [0.75, 0.25, 0.5, 1],
    "calibration": CALIBRATION,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "trained")
    set_spec(folder, CONTENT)
    return folder


def set_spec(folder: Path, content: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {KEY: content}))


@pytest.mark.slow
def test_the_layers_of_the_config(checkpoint, tmp_path):
    converted = convert(checkpoint, tmp_path / "m.gguf", outtype="f32")
    model = read_model(tmp_path / "m.gguf")
    assert model.spec == converted.spec == SPEC
    assert model.provenance == Provenance("frequency", (0.75, 0.25, 0.5, 1.0), json.dumps(CALIBRATION))
    assert converted.report_folder is None  # nothing was measured
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.slow
def test_a_spec_without_ratios(checkpoint, tmp_path):
    folder = write_checkpoint(tmp_path / "bare")
    set_spec(folder, {key: value for key, value in CONTENT.items() if key not in ("lazy_ratio", "calibration")})
    convert(folder, tmp_path / "m.gguf", outtype="f32", select="trained", report=tmp_path / "report")
    assert read_model(tmp_path / "m.gguf").provenance == Provenance("frequency")
    said = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (said["strategy"], said["prefill"], said["streaming_layers"]) == ("frequency", "stream", [0, 3])
    assert "2 of 4 layers that the checkpoint was trained to stream in" in said["reason"]


def test_layers_that_only_predict_ahead_have_no_ratio():
    spec, provenance = read_spec({KEY: CONTENT}, N_LAYER + 1)
    assert spec.n_layer == N_LAYER + 1 and spec.layers == (0, 3)
    assert provenance.lazy_ratio[:4] == (0.75, 0.25, 0.5, 1.0) and math.isnan(provenance.lazy_ratio[4])


@pytest.mark.slow
def test_what_is_asked_for_overrides_it(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "m.gguf", outtype="f32", layers="2", sink=0, window=5)
    model = read_model(tmp_path / "m.gguf")
    assert (model.spec, model.provenance) == (StreamingSpec((2,), N_LAYER, 0, 5), Provenance("manual"))


@pytest.mark.parametrize(
    "options, name",
    [
        ({}, "trained"),
        ({"select": "trained"}, "trained"),
        ({"select": "interleave-odd"}, "interleave-odd"),
        ({"select": "lazy-ratio", "fraction": 0.25}, "lazy-ratio"),
        ({"layers": "1"}, "manual"),
        ({"threshold": 0.5}, "threshold"),
    ],
)
def test_which_strategy_is_asked_for(options, name):
    assert Options(**options).strategy_for({KEY: CONTENT}).name == name
    assert Options(**options).strategy_for({}).name == (name if options else "loss")


def test_a_share_of_the_layers_needs_a_strategy(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="was trained to stream in certain layers: must have --select with --streaming-fraction"):
        convert(checkpoint, tmp_path / "m.gguf", fraction=0.25)
    assert not list(tmp_path.iterdir())


def test_sinks_and_window_are_its_own():
    model = Model("llama", "mine", N_LAYER, N_LAYER, {KEY: CONTENT})
    for asked in ({}, {"sink": 3, "window": 17}):
        assert Trained().select(Request(model, **asked)).spec(N_LAYER) == SPEC
    with pytest.raises(ValueError, match="trained with sink 3 and window 17, must not be given sink 4 and window 2044"):
        Trained().select(Request(model, window=2044))
    with pytest.raises(ValueError, match=f'the config.json of plain has no "{KEY}", must be of a checkpoint that was trained'):
        Trained().select(Request(Model("llama", "plain", N_LAYER, N_LAYER)))


@pytest.mark.slow
def test_a_wrong_spec_is_one_line(tmp_path):
    folder = write_checkpoint(tmp_path / "wrong")
    set_spec(folder, CONTENT | {"window": 0})
    result = subprocess.run(
        [sys.executable, SCRIPT, folder, "--outfile", tmp_path / "m.gguf"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    complaint = result.stderr.splitlines()[-1]
    assert complaint.endswith(f"config.json: {KEY}.window = 0: must be an integer from 1 to 2147483647")
    assert "Traceback" not in result.stderr and not (tmp_path / "m.gguf").exists()
