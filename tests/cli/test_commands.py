"""The commands as a user types them: what they print, and one line for each error."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from support.tiny_checkpoint import N_LAYER, SINK, WINDOW, hybrid_file  # noqa: F401 - a fixture

from lt_gguf.cli import inspect
from lt_gguf.cli import model as model_options
from lt_gguf.gguf import flagging
from lt_gguf.gguf.file import read_model
from lt_gguf.memory.kv import kv_memory
from lt_gguf.memory.sizes import format_bytes, parse_size
from lt_gguf.models import DEFAULT_MODEL, MODELS, package
from lt_gguf.runtime.cpu import usable_cores
from lt_gguf.runtime.library import load_llama_cpp
from lt_gguf.spec import Provenance

IN_FULL = ["--streaming", "layers=1,3;prefill=full"]
QUICK = ["--threads", "1", "--ctx", "512", "--batch-size", "64"]


# ---------------------------------------------------------------------------------------------- inspect


def test_no_memory_is_one_line(lt_gguf_command, hybrid_file, monkeypatch):
    def no_memory(*_):
        np.empty(1 << 60, np.int8)

    monkeypatch.setattr(inspect, "read_model", no_memory)
    status, out, err = lt_gguf_command("inspect", hybrid_file)
    assert (status, out) == (1, "")
    assert err.startswith("error: this process can get no more memory (Unable to allocate ") and err.count("\n") == 1


@pytest.mark.slow
def test_inspect_json(lt_gguf_command, hybrid_file):
    status, out, err = lt_gguf_command("inspect", hybrid_file, "--json", "--cache-type", "f32")
    assert (status, err) == (0, "")
    described = json.loads(out)
    assert described["architecture"] == "llama"
    assert described["streaming"] == {
        "spec": f"layers=1,3;sink={SINK};window={WINDOW};prefill=stream",
        "layers": [1, 3],
        "sink": SINK,
        "window": WINDOW,
        "prefill": "stream",
        "selection": "interleave-odd",
    }
    assert [layer["attention"] for layer in described["layers"]] == ["full", "streaming"] * 2
    assert [layer["kv_bytes_per_token"] for layer in described["layers"]] == [2 * 2 * 16 * 4] * N_LAYER
    model = read_model(hybrid_file)
    assert [entry["n_ctx"] for entry in described["kv_memory"]] == [4096, 32768, 131072]
    for entry in described["kv_memory"]:
        hybrid = kv_memory(model.kv_shape, model.spec, entry["n_ctx"], type_k="f32")
        assert [entry[f"hybrid_{kind}_layers"] for kind in ("full", "streaming", "own_window")] == [*hybrid]
        assert entry["hybrid"] == hybrid.total
        assert entry["full"] == N_LAYER * 2 * 2 * 16 * 4 * entry["n_ctx"]
        assert entry["prompt_whole"] == entry["prompt_batches"] == 0


def test_inspect_tables(lt_gguf_command, hybrid_file):
    status, out, _ = lt_gguf_command("inspect", hybrid_file)
    assert status == 0
    assert "2 layers stream, chosen by interleave-odd: 1,3; sink 2, window 40" in " ".join(out.split())
    # 4 layers x 128 bytes x 4096 cells; 2 x 128 x 4096 + 2 x 128 x 768
    assert "2.00 MiB" in out and "1.19 MiB" in out and "41%" in out
    assert "peak" not in out
    status, out, _ = lt_gguf_command("inspect", hybrid_file, "--streaming", "layers=all;prefill=full")
    assert status == 0 and "At its peak" in out
    # in 4 layers at once, because of the hidden states: 4 x 128 bytes x (768 + 4096) cells
    assert "2.38 MiB" in out
    status, out, _ = lt_gguf_command("inspect", hybrid_file, "--streaming", "off")
    assert status == 0
    assert "no layer streams" in out
    status, out, _ = lt_gguf_command("inspect", hybrid_file, "--streaming", "layers=all;sink=0;window=1", "--json")
    assert [layer["attention"] for layer in json.loads(out)["layers"]] == ["streaming"] * N_LAYER


def test_inspect_shows_a_line_for_each_run_of_equal_layers(lt_gguf_command, hybrid_file):
    def rows(*arguments: object) -> list[list[str]]:
        status, out, _ = lt_gguf_command("inspect", hybrid_file, *arguments)
        assert status == 0
        lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
        return [cells[:3] for cells in lines if cells[1] in ("full", "streaming")]

    assert rows("--streaming", "off") == [["0-3", "full", "2"]]
    assert rows("--streaming", "layers=1,2") == [["0", "full", "2"], ["1-2", "streaming", "2"], ["3", "full", "2"]]
    assert rows() == [["0", "full", "2"], ["1", "streaming", "2"], ["2", "full", "2"], ["3", "streaming", "2"]]


def test_inspect_shows_every_layer_that_has_a_lazy_ratio(lt_gguf_command, hybrid_file, tmp_path):
    spec = read_model(hybrid_file).spec
    path = tmp_path / "measured.gguf"
    flagging.flag(hybrid_file, path, replace(spec, layers=()), Provenance("manual", lazy_ratio=(0.5,) * N_LAYER))
    status, out, _ = lt_gguf_command("inspect", path)
    assert status == 0 and out.count("0.5000") == N_LAYER


# ---------------------------------------------------------------------------------------------- version


def test_version(lt_gguf_command):
    pin = tomllib.loads((Path(__file__).parents[2] / "ggml-patch" / "UPSTREAM.toml").read_text())
    status, out, err = lt_gguf_command("--version")
    assert (status, err) == (0, "")
    own, llama_cpp, *backends = out.splitlines()
    assert own == f"lt-gguf {metadata.version('lt-gguf')}"
    assert llama_cpp == f"llama.cpp {pin['commit']}, patched; llama-cpp-python {pin['version']}"
    assert any(line.startswith("CPU: ") for line in backends)


def test_version_without_libraries(lt_gguf_command, tmp_path, monkeypatch):
    monkeypatch.setenv("LT_GGUF_LIB_PATH", str(tmp_path))
    load_llama_cpp.cache_clear()
    status, out, err = lt_gguf_command("--version")
    assert (status, err) == (0, "")
    assert out.splitlines()[1].startswith(f"no native library: LT_GGUF_LIB_PATH={tmp_path} holds no libllama")


# -------------------------------------------------------------------------------------------------- run


def test_run_continues_a_prompt(lt_gguf_command, hybrid_file, monkeypatch):
    status, first, err = lt_gguf_command("run", hybrid_file, "-p", "the quick", "-n", 8, "--temp", 0, *QUICK)
    assert (status, err) == (0, "")
    assert first.strip()
    status, again, _ = lt_gguf_command("run", hybrid_file, "-p", "the quick", "-n", 8, "--temp", 0, *QUICK, "--streaming", "off")
    assert again == first  # the prompt is shorter than the window
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick"))
    _, piped, _ = lt_gguf_command("run", hybrid_file, "-p", "-", "-n", 8, "--temp", 0, *QUICK)
    assert piped == first
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\n"))  # the newline is the shell's
    status, piped, err = lt_gguf_command("run", hybrid_file, "-n", 8, "--temp", 0, *QUICK)
    assert (status, piped, err) == (0, first, "")


def test_run_says_that_it_reads_from_the_terminal(lt_gguf_command, hybrid_file, monkeypatch):
    stdin = io.StringIO("the quick")
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    status, out, err = lt_gguf_command("run", hybrid_file, "-n", 2, *QUICK)
    assert status == 0 and out.strip()
    assert err.count("\n") == 1 and "until Ctrl-D" in err


@pytest.mark.parametrize("command", ["run", "chat"])
def test_without_a_model_the_default_one_is_taken(command, lt_gguf_command, hybrid_file, monkeypatch):
    monkeypatch.setattr(package, "fetch", lambda model: hybrid_file if model is MODELS[DEFAULT_MODEL] else None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\n"))
    status, out, err = lt_gguf_command(command, "-n", 4, *QUICK)
    assert status == 0 and out.strip()
    assert err.splitlines()[0] == "no model is named, taking smollm2 (SmolLM2-135M-Instruct)"


def test_a_name_stands_for_a_file(lt_gguf_command, hybrid_file, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "fetch", lambda model: hybrid_file)
    for arguments in (
        ["run", "smollm2", "-p", "the", "-n", 1, *QUICK],
        ["inspect", "smollm2"],
        [
            "analyze",
            "smollm2",
            "--select",
            "interleave-odd",
            "--samples",
            1,
            "--calibration-length",
            128,
            "--window",
            40,
            "--sink",
            2,
        ],
        ["flag", "smollm2", tmp_path / "out.gguf", "--off"],
        ["eval", "smollm2", "--tasks", "kl", "--lengths", 128, "--text-samples", 1],
    ):
        status, out, err = lt_gguf_command(*arguments)
        assert status == 0 and out.strip(), (arguments, err)
    status, _, err = lt_gguf_command("flag", "smollm2", "--in-place", "--off")
    assert status == 1 and "lies in a cache, which is for all who use it" in err
    assert read_model(hybrid_file).spec is not None


def test_run_shows_llama_cpps_log_if_asked(lt_gguf_command, hybrid_file):
    status, _, err = lt_gguf_command("run", hybrid_file, "-p", "the", "-n", 1, *QUICK, "--verbose")
    assert status == 0
    assert "streaming layers: layers=1,3" in err


@pytest.mark.parametrize(
    "arguments, status, complaint",
    [
        (["run", "FILE"], 1, "standard input: is empty, must have the prompt"),
        (["run", "smolm2", "-p", "x"], 1, "smolm2: there is no such file and no model of that name (did you mean smollm2?)"),
        (["analyze", "smolm2"], 1, "must be the folder of a checkpoint, a GGUF file, a name (smollm2)"),
        (["convert", "smollm2"], 1, "smollm2: is a GGUF file, not a checkpoint: lt-gguf flag smollm2"),
        (["run", "none.gguf", "-p", "x"], 1, "none.gguf: No such file or directory"),
        (["run", "FILE", "-p", "x", "--streaming", "layers=9"], 1, 'layers = "9": must be'),
        (["run", "FILE", "-p", "x", "--ctx", "-1"], 1, "--ctx = -1: must be at least 0"),
        (["run", "FILE", "-p", "x", "--threads", "-1"], 1, "--threads = -1: must be at least 0"),
        (["run", "FILE", "-p", "x", "--cache-type", "q9"], 1, 'cache type = "q9": must be one of f32'),
        (["run", "FILE", "-p", "x" * 3000, *QUICK], 1, "exceed context window of 512"),
        (["chat", "FILE", "--temp", "warm"], 2, "(lt-gguf chat --help shows what there is)"),
        (["inspect", "FILE", "--streaming", "window=0"], 1, "window = 0: must be"),
        (["inspect", "FILE", "--cache-type", "q8_0"], 1, "don't divide this model's heads of 16"),
        (["inspect", __file__], 1, "is not a GGUF file"),
        (["run", "FILE", "-p", "x", "--cache-keep", "4"], 1, '--cache-keep = "4": must be "all", "none", or layers and ranges of'),
        (["chat", "FILE", "--cache-keep", "0;1"], 1, '--cache-keep = "0;1": must be "all", "none", or layers and ranges of'),
        (["inspect", "FILE", "--cache-keep", ""], 1, '--cache-keep = "": must be "all", "none", or layers and ranges of layers'),
        (["serve", "FILE", "--cache-keep", "2-1"], 1, '--cache-keep = "2-1": must be "all", "none", or layers and ranges of'),
        (["eval", "FILE", "--cache-keep", "x"], 1, '--cache-keep = "x": must be "all", "none", or layers and ranges of layers'),
        (["analyze", "FILE", "--cache-keep", "9"], 1, '--cache-keep = "9": must be "all", "none", or layers and ranges of layers'),
        (["convert", "none", "--ctx", "4096"], 1, "--ctx is for --kv-budget, which is missing"),
        (
            ["convert", "none", "--cache-keep", "0-"],
            1,
            '--cache-keep = "0-": must be "all", "none", or layers and ranges of layers',
        ),
        (["convert", "none", "--cache-type", "q9"], 1, 'cache type = "q9": must be one of f32'),
        (["convert", "none", "--cache-breaks", "q4_0,"], 1, 'cache type = "": must be one of f32'),
        (["run", "FILE", "-p", "x", "--cache-type", "f16/f16/f16"], 1, "must be one type, or those of K and of V, as in q8_0/q4_0"),
        (["eval", "FILE", "--cache-type", "f16/q9", "--tasks", "kl"], 1, 'cache type = "q9": must be one of f32'),
        (["run", "FILE", "-p", "x", "--streaming", "auto:2"], 1, "must be a number from 0 to 1"),
        (["run", "FILE", "-p", "x", "--prompt-limit", "much"], 1, '--prompt-limit: size = "much": must be a number of bytes'),
        (["run", "FILE", "-p", "x" * 400, *QUICK, *IN_FULL, "--prompt-limit", "1KiB"], 1, "prompt"),
        (["chat", "FILE", "--snapshot-limit", "-1"], 1, '--snapshot-limit: size = "-1"'),
        (["inspect", "FILE", "--streaming", "auto:0.5"], 1, '"auto:0.5": chooses the layers while a prompt is read'),
        (["convert", "none", "--streaming-fraction", "0.5"], 1, "none: must be the folder of a Hugging Face checkpoint"),
        (["convert", "none", "--select", "best"], 1, 'selection = "best": must be one of loss, lazy-ratio'),
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_an_error_is_one_line(lt_gguf_command, hybrid_file, monkeypatch, arguments, status, complaint):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    arguments = [hybrid_file if argument == "FILE" else argument for argument in arguments]
    code, out, err = lt_gguf_command(*arguments)
    errors = [line for line in err.splitlines() if not line.startswith("Converting")]
    assert (code, out, len(errors)) == (status, "", 1)
    assert errors[0].startswith("error: ") and complaint in errors[0]


def test_a_reader_that_leaves_is_no_error(hybrid_file):
    command = [sys.executable, "-c", "from lt_gguf.cli import main; main()", "inspect", str(hybrid_file), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    "given, threads", [([], "3 CPU threads"), (["--threads", "0"], "3 CPU threads"), (["--threads", "1"], "1 CPU thread")]
)
def test_the_number_of_threads_is_shown(lt_gguf_command, hybrid_file, monkeypatch, given, threads):
    monkeypatch.setattr(model_options, "usable_cores", lambda: 3)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/exit\n"))
    _, _, err = lt_gguf_command("chat", hybrid_file, "--ctx", 512, *given)
    assert err.splitlines()[0].endswith(f" · {threads} · context of 512 tokens")


def test_help_says_how_many_threads_there_are(lt_gguf_command):
    status, out, _ = lt_gguf_command("run", "--help")
    assert status == 0
    assert f"0: the physical cores that the process may use, here {usable_cores()}." in " ".join(out.split())


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    "n_bytes, text", [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (544 * 2**20, "544.00 MiB"), (3 * 2**40, "3.00 TiB")]
)
def test_format_bytes(n_bytes, text):
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    "text, n_bytes",
    [("0", 0), ("1048576", 2**20), ("17 B", 17), ("512MiB", 2**29), ("1.5 gib", 3 * 2**29), ("544.00 MiB", 544 * 2**20)],
)
def test_parse_size(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.5", "1e9", "5 MB", "5 MiB 3", "nan"])
def test_bad_size(text):
    with pytest.raises(ValueError, match="must be a number of bytes"):
        parse_size(text)
