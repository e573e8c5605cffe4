"""`lt-gguf analyze`: the lazy layers of a GGUF file."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
from tiny_checkpoint import N_LAYER, hybrid_file  # noqa: F401 - a fixture

import lt_gguf
from lt_gguf.cli import app
from lt_gguf.cli.common import run
from lt_gguf.lazy_layers import laziest, write_json
from lt_gguf.spec import StreamingSpec

QUICK = ["--threads", "1", "--batch-size", "64"]
SMALL = ["--samples", "3", "--length", "200", "--sink", "2", "--window", "40", "--w-last", "16"]


@pytest.fixture
def analyze(capfd, hybrid_file):
    """Runs `lt-gguf analyze FILE ARGUMENTS` in this process; returns its exit status, stdout and stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run(app, "lt-gguf", ["analyze", str(hybrid_file), *map(str, arguments), *QUICK])
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return command


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "calibration.txt"
    path.write_text("".join(f"line {i} of the quick brown fox, öäü\n" for i in range(200)))
    return path


def test_writes_the_mean_of_the_samples(analyze, hybrid_file, text, tmp_path):
    status, out, err = analyze("--text", text, *SMALL, "--out", tmp_path / "lazy.json")
    assert (status, err) == (0, "")
    written = json.loads((tmp_path / "lazy.json").read_text())

    settings = {"n_ctx": 64, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}
    llm = lt_gguf.Llama(str(hybrid_file), **settings)
    tokens = llm.tokenize(text.read_bytes(), add_bos=False)
    parts = [[1] + tokens[i * (len(tokens) // 3) :][:199] for i in range(3)]
    expected = np.mean([llm.lazy_ratios(part, 2, 40, 16) for part in parts], axis=0)
    np.testing.assert_allclose(written["lazy_ratio"], expected, atol=1e-5)
    assert written["streaming_layers"] == sorted(np.argsort(expected, kind="stable")[-2:].tolist())

    assert written["strategy"] == "lazy-ratio" and written["fraction"] == 0.5
    assert (written["sink"], written["window"], written["w_last"]) == (2, 40, 16)
    assert written["model"] == hybrid_file.name and written["architecture"] == "llama"
    assert written["calibration"] == {
        "data": "calibration.txt",
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "samples": 3,
        "length": 200,
        "tokens": 600,
        "w_last": 16,
        "w_sink": 2,
        "w_recent": 40,
    }
    spec = StreamingSpec(tuple(written["streaming_layers"]), N_LAYER, 2, 40, "full")
    assert written["streaming"] == str(spec)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.txt", "lazy.json"]

    lines = out.splitlines()
    assert [il for il in range(N_LAYER) if lines[1 + il].rstrip().endswith("lazy")] == list(spec.layers)
    assert f"{written['lazy_ratio'][0]:.4f}" in lines[1]
    assert f'--streaming "{spec}"' in lines[-1]


def test_the_share_of_the_layers(analyze, text, tmp_path):
    for fraction, n in ((0, 0), (0.3, 1), (1, 4)):
        assert analyze("--text", text, *SMALL, "--fraction", fraction, "--out", tmp_path / "lazy.json")[0] == 0
        assert len(json.loads((tmp_path / "lazy.json").read_text())["streaming_layers"]) == n


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (SMALL, "--text is missing: give a UTF-8 text"),
        (["--text", "none.txt", *SMALL], "none.txt: No such file or directory"),
        (["--text", "BINARY", *SMALL], "is not UTF-8, see byte 3"),
        (["--text", "TEXT", *SMALL, "--samples", "3000"], "tokens, must have 597000 for 3000 samples of 200"),
        (["--text", "TEXT", *SMALL, "--samples", "0"], "samples = 0: must be at least 1"),
        (["--text", "TEXT", *SMALL, "--length", "42"], "--length = 42: must be more than sink + window = 42"),
        (["--text", "TEXT", *SMALL, "--samples", "1", "--length", "3000"], "must have at most the model's context of 2048"),
        (["--text", "TEXT", *SMALL, "--w-last", "0"], "w_last = 0: must be an integer from 1"),
        (["--text", "TEXT", *SMALL, "--fraction", "1.5"], "fraction = 1.5: must be a number from 0 to 1"),
        (["--text", "TEXT", *SMALL, "--out", "none/lazy.json"], "--out = none/lazy.json: its folder doesn't exist"),
    ],
)
def test_an_error_is_one_line(analyze, text, tmp_path, arguments, complaint):
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"abc\xff")
    files = {"TEXT": text, "BINARY": binary}
    status, out, err = analyze(*(files.get(argument, argument) for argument in arguments))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ") and complaint in err


def test_laziest():
    assert laziest([0.1, 0.9, 0.5, 0.7], 0.5) == (1, 3)
    assert laziest([0.5] * 5, 0.5) == (3, 4)  # of equal ones the first stay full
    assert laziest([math.nan, 0.2, 0.1, math.nan], 0.5) == (1,)
    assert laziest([0.1 * il for il in range(10)], 0.7) == (3, 4, 5, 6, 7, 8, 9)
    assert laziest([0.3, 0.2], 0) == ()


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lazy.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
