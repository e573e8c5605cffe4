"""Streaming metadata: what is right is used, and what is wrong is refused at load by a line that names the key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.gguf_edit import add_metadata, encode
from support.oracle import EXACT, Subject, difference

from lt_gguf.spec import AutoSpec, StreamingSpec, parse_running

CHILD = Path(__file__).parents[1] / "support" / "load_child.py"
N_LAYER = 3
LAYERS, SINK, WINDOW, PREFILL = (f"llama.attention.streaming.{name}" for name in ("layers", "sink", "window", "prefill"))
RIGHT = {
    LAYERS: ("array of bool", [False, True, False]),
    SINK: ("uint32", 2),
    WINDOW: ("uint32", 9),
    PREFILL: ("string", "stream"),
}
TOKENS = list(range(10, 60))

# what differs from RIGHT (None: the key is missing), and the key that the error names
WRONG = [
    ({LAYERS: ("array of bool", [True])}, LAYERS),
    ({LAYERS: ("array of bool", [True] * 4)}, LAYERS),
    ({LAYERS: ("array of bool", [])}, LAYERS),
    ({LAYERS: ("array of bool", [True] * 100_000)}, LAYERS),
    ({LAYERS: ("bool", True)}, LAYERS),
    ({LAYERS: ("string", "1")}, LAYERS),
    ({LAYERS: ("array of uint32", [0, 1, 0])}, LAYERS),
    ({LAYERS: ("array of int8", [0, 1, 0])}, LAYERS),
    ({LAYERS: ("array of string", ["a", "b", "c"])}, LAYERS),
    ({LAYERS: None}, LAYERS),
    ({SINK: ("int32", -1)}, SINK),
    ({SINK: ("int32", 4)}, SINK),
    ({SINK: ("uint64", 4)}, SINK),
    ({SINK: ("uint32", 2**32 - 1)}, SINK),
    ({SINK: ("float32", 4.0)}, SINK),
    ({SINK: ("string", "4")}, SINK),
    ({SINK: ("array of uint32", [4, 4, 4])}, SINK),
    ({SINK: None}, SINK),
    ({WINDOW: ("uint32", 0)}, WINDOW),
    ({WINDOW: ("uint32", 2**31)}, WINDOW),
    ({WINDOW: ("int32", -5)}, WINDOW),
    ({WINDOW: ("int64", -5)}, WINDOW),
    ({WINDOW: ("bool", True)}, WINDOW),
    ({WINDOW: None}, WINDOW),
    ({PREFILL: ("string", "")}, PREFILL),
    ({PREFILL: ("string", "Stream")}, PREFILL),
    ({PREFILL: ("string", "both")}, PREFILL),
    ({PREFILL: ("uint32", 1)}, PREFILL),
    ({PREFILL: ("array of string", ["stream"])}, PREFILL),
    ({PREFILL: None}, PREFILL),
    ({PREFILL: ("string", "fullstream")}, PREFILL),
    ({LAYERS: None, WINDOW: None, PREFILL: None}, LAYERS),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Subject:
    return Subject.build("llama", N_LAYER, tmp_path_factory.mktemp("metadata"))


def flagged(plain: Subject, directory: Path, changes: dict) -> Path:
    keys = [encode(key, *typed) for key, typed in (RIGHT | changes).items() if typed is not None]
    return add_metadata(plain.native.path, directory / f"{len(list(directory.iterdir()))}.gguf", keys)


def load(paths: list[Path], decode=None, **environment: str) -> list[dict]:
    """What a process that loads these files reports, one answer a file; fewer if it crashed."""
    requests = "".join(json.dumps({"path": str(path), "decode": decode}) + "\n" for path in paths)
    child = subprocess.run(
        [sys.executable, CHILD], input=requests, capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert child.returncode == 0, f"crashed with {child.returncode}: {child.stderr[-1000:]}"
    return [json.loads(line) for line in child.stdout.splitlines()]


def test_wrong_metadata_is_refused_by_name(plain, tmp_path):
    answers = load([flagged(plain, tmp_path, changes) for changes, _ in WRONG])
    assert len(answers) == len(WRONG)
    for (changes, key), answer in zip(WRONG, answers):
        assert answer["error"], f"{changes} was loaded"
        lines = [line for line in answer["error"].splitlines() if key in line]
        assert lines, f"{changes}: no line names {key}: {answer['error'][-500:]}"


def test_right_metadata_is_used(plain, tmp_path):
    extremes = [
        ({}, StreamingSpec((1,), N_LAYER, 2, 9, "stream")),
        ({PREFILL: ("string", "full")}, StreamingSpec((1,), N_LAYER, 2, 9, "full")),
        ({LAYERS: ("array of bool", [True] * 3)}, StreamingSpec((0, 1, 2), N_LAYER, 2, 9, "stream")),
        ({SINK: ("uint32", 0), WINDOW: ("uint32", 1)}, StreamingSpec((1,), N_LAYER, 0, 1, "stream")),
        ({SINK: ("uint32", 2**31 - 1)}, StreamingSpec((1,), N_LAYER, 2**31 - 1, 9, "stream")),
        ({WINDOW: ("uint32", 2**31 - 1)}, StreamingSpec((1,), N_LAYER, 2, 2**31 - 1, "stream")),
        ({LAYERS: ("array of bool", [False] * 3)}, None),
    ]
    answers = load([flagged(plain, tmp_path, changes) for changes, _ in extremes], decode=TOKENS)
    for (changes, spec), answer in zip(extremes, answers, strict=True):
        assert answer["error"] is None, f"{changes}: {answer['error'][-500:]}"
        assert answer["spec"] == ("off" if spec is None else str(spec))
        # all tokens ask for logits, so that they are decoded ones in both modes
        expected = plain.expected(np.array(TOKENS), spec and replace(spec, prefill="stream"))[-1]
        assert difference(np.array(answer["logits"]), expected) <= EXACT


def test_a_key_that_is_there_twice(plain, tmp_path):
    """gguf.cpp refuses the file; it must only not crash."""
    keys = [encode(key, *typed) for key, typed in RIGHT.items()]
    path = add_metadata(plain.native.path, tmp_path / "twice.gguf", keys + [encode(WINDOW, "uint32", 3)])
    (answer,) = load([path])
    assert answer["error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "streaming, expected",
    [
        ("off", "off"),
        ("window=30", "layers=1;sink=2;window=30;prefill=stream"),
        ("layers=all;sink=0", "layers=0-2;sink=0;window=9;prefill=stream"),
        ("prefill=full", "layers=1;sink=2;window=9;prefill=full"),
        ("auto=0.5", "auto=0.5;layers=none;sink=2;window=9;prefill=full;w_last=16;lazy=min"),
        ("auto:0.5", "auto=0.5;layers=none;sink=2;window=9;prefill=full;w_last=16;lazy=min"),
        ("auto=0.5;lazy=mean", "auto=0.5;layers=none;sink=2;window=9;prefill=full;w_last=16;lazy=mean"),
        ("", "layers=1;sink=2;window=9;prefill=stream"),
    ],
)
def test_the_environment_overrides_the_file(plain, tmp_path, streaming, expected):
    (answer,) = load([flagged(plain, tmp_path, {})], LT_STREAMING=streaming)
    assert answer["spec"] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "streaming",
    [
        "layers=3",
        "window=0",
        "layers=1;prefill=half",
        "auto=2",
        "auto=0.5;lazy=max",
        "lazy=min",
        "auto",
        "window:9",
        "auto=0.5;layers=1",
        "w_last=8",
        "layers=1;wndow=3",
        "x",
        "layers=1;;",
        ";",
    ],
)
def test_a_wrong_environment_is_refused_by_name(plain, tmp_path, streaming):
    (answer,) = load([flagged(plain, tmp_path, {})], LT_STREAMING=streaming)
    assert answer["error"] and "LT_STREAMING" in answer["error"]


def test_a_spec_at_run_time(plain):
    """lt_model_set_spec: errors change nothing, None goes back, and contexts of one model differ."""
    model = plain.native
    for wrong in ("layers=7", "sink=-1", "layers=1;window=0", "layers=1;prefill=never", "sink=4", "nonsense", "layers=1;layers=2"):
        with pytest.raises(ValueError):
            model.set_streaming(wrong)
        assert model.streaming() == "off"
    first, second = StreamingSpec((0, 2), N_LAYER, 1, 5, "stream"), StreamingSpec((1,), N_LAYER, 3, 20, "stream")
    tokens = np.array(TOKENS)
    with plain.context(first, n_ctx=256) as a, plain.context(second, n_ctx=256) as b, plain.context(None, n_ctx=256) as c:
        assert [a.streaming(), b.streaming(), c.streaming()] == [str(first), str(second), "off"]
        for _ in range(2):
            for context, spec in ((a, first), (b, second), (c, None)):
                assert difference(context.decode(tokens), plain.expected(tokens, spec)) <= EXACT
                context.clear()
    assert model.streaming() == "off"


def test_what_is_left_out_has_the_same_default_everywhere(plain):
    model = plain.native
    try:
        model.set_streaming("layers=1")
        assert model.streaming() == str(StreamingSpec((1,), N_LAYER))
        model.set_streaming("auto=0.5")
        assert parse_running(model.streaming(), N_LAYER)[1] == AutoSpec()
    finally:
        model.set_streaming(None)
