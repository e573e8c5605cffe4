"""The converter: upstream's tensors byte for byte, our keys beside upstream's, and nothing left of a failed conversion."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import psutil
import pytest
from tiny_checkpoint import N_LAYER, write_checkpoint

from lt_gguf import conversion_worker
from lt_gguf.conversion import convert
from lt_gguf.gguf_file import read_model
from lt_gguf.runtime.library import upstream_dir
from lt_gguf.spec import Provenance, StreamingSpec

SCRIPT = Path(__file__).parent.parent / "convert" / "hf_to_gguf_lt.py"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "qwen2", "qwen2", tie_word_embeddings=True)


def run(*arguments: object, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120, **settings)


def assert_same_but_for_the_streaming_keys(ours: Path, upstreams: Path) -> None:
    ours_reader, upstreams_reader = gguf.GGUFReader(ours), gguf.GGUFReader(upstreams)
    added = [key for key in ours_reader.fields if ".attention.streaming." in key or key.startswith("lighttransfer.")]
    assert len(added) == 6
    assert [key for key in ours_reader.fields if key not in added] == list(upstreams_reader.fields)
    for key, field in upstreams_reader.fields.items():
        if key != "GGUF.kv_count":
            assert ours_reader.fields[key].types == field.types
            assert ours_reader.fields[key].contents() == field.contents()
    assert len(ours_reader.tensors) == len(upstreams_reader.tensors) > 8
    for our, upstreams_own in zip(ours_reader.tensors, upstreams_reader.tensors):
        assert (our.name, our.tensor_type, our.shape.tolist()) == (
            upstreams_own.name,
            upstreams_own.tensor_type,
            upstreams_own.shape.tolist(),
        )
        assert our.data.tobytes() == upstreams_own.data.tobytes()


@pytest.mark.parametrize(
    "family, outtype, options, spec, selection",
    [
        (
            "llama",
            "f16",
            ["--streaming-fraction", "0.5"],
            StreamingSpec((1, 3), N_LAYER),
            "interleave",
        ),
        (
            "qwen2",
            "q8_0",
            ["--streaming-layers", "0,2-3", "--sink", "0", "--window", "7", "--prefill", "full"],
            StreamingSpec((0, 2, 3), N_LAYER, sink=0, window=7, prefill="full"),
            "manual",
        ),
    ],
)
def test_equals_upstream(family, outtype, options, spec, selection, tmp_path, request):
    checkpoint = request.getfixturevalue(family)
    ours, upstreams = tmp_path / "ours.gguf", tmp_path / "upstream.gguf"
    result = run(SCRIPT, checkpoint, "--outfile", ours, "--outtype", outtype, *options)
    assert result.returncode == 0, result.stderr
    assert str(ours) in result.stdout
    assert f"{len(spec.layers)} of {N_LAYER} layers stream" in result.stdout
    assert "100%" in result.stderr  # progress
    assert "warning" not in result.stderr
    written = run(upstream_dir() / "convert_hf_to_gguf.py", checkpoint, "--outfile", upstreams, "--outtype", outtype)
    assert written.returncode == 0, written.stderr
    assert_same_but_for_the_streaming_keys(ours, upstreams)
    model = read_model(ours)
    assert (model.spec, model.provenance) == (spec, Provenance(selection))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.gguf", "upstream.gguf"]


def test_upstream_names_the_file_where_a_folder_is_given(llama, tmp_path):
    (file,) = convert(llama, tmp_path, outtype="f32", layers="none")
    assert file.parent == tmp_path
    assert file.suffix == ".gguf" and "F32" in file.name
    assert read_model(file).spec == StreamingSpec((), N_LAYER)


# -------------------------------------------------------------------------------------------- bad input


def broken(llama: Path, folder: Path, **changes: object) -> Path:
    """A copy of the checkpoint's files (links) with a changed config.json."""
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((llama / "config.json").read_text()) | changes
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({}, "give either the layers, as in 1,3,5-9, or their fraction"),
        ({"layers": "1", "fraction": 0.5}, "give either"),
        ({"layers": "3-1"}, 'layers = "3-1": must be'),
        ({"fraction": 1.5}, "fraction = 1.5: must be a number from 0 to 1"),
        ({"fraction": 0.5, "window": 0}, "window = 0: must be an integer from 1"),
        ({"layers": "1", "window": 0}, "window = 0"),
        ({"fraction": 0.5, "sink": -1}, "sink = -1"),
        ({"fraction": 0.5, "prefill": "later"}, 'prefill = "later": must be "full" or "stream"'),
        ({"fraction": 0.5, "outtype": "q3"}, 'outtype = "q3": must be one of f32, f16'),
    ],
)
def test_bad_arguments(llama, tmp_path, arguments, complaint):
    with pytest.raises(ValueError) as error:
        convert(llama, tmp_path / "a.gguf", **arguments)
    assert complaint in str(error.value)
    assert not list(tmp_path.iterdir())


def test_bad_folders_and_files(llama, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    existing = tmp_path / "existing.gguf"
    existing.write_text("mine")
    damaged = broken(llama, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    weightless = broken(llama, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    for checkpoint, outfile, complaint in (
        (tmp_path / "none", tmp_path / "a.gguf", "none: must be the folder of a Hugging Face checkpoint"),
        (empty, tmp_path / "a.gguf", "empty: has no config.json"),
        (damaged, tmp_path / "a.gguf", r"damaged/config.json: Expecting property name"),
        (weightless, tmp_path / "a.gguf", r"weightless: has no weights, must have model\*.safetensors"),
        (llama, tmp_path / "nowhere" / "a.gguf", "the folder .*/nowhere doesn't exist"),
        (llama, existing, "existing.gguf: exists, remove it or use --overwrite"),
    ):
        with pytest.raises((ValueError, OSError), match=complaint):
            convert(checkpoint, outfile, fraction=0.5)
    assert existing.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "empty", "existing.gguf", "weightless"]


def test_what_is_known_only_when_upstream_has_read_the_checkpoint(llama, tmp_path):
    destination = tmp_path / "out"
    destination.mkdir()
    gemma2 = write_checkpoint(tmp_path / "gemma2", "gemma2")
    unknown = broken(llama, tmp_path / "unknown", architectures=["TinyNetForCausalLM"])
    outfile = destination / "a.gguf"
    outfile.write_text("mine")
    for checkpoint, layers, complaint in (
        (llama, "2-4", f'layers = "2-4": must be "all", "none", or layers and ranges of layers from 0 to {N_LAYER - 1}'),
        (gemma2, "1", "models of the architecture gemma2 can't have streaming layers: it has a sliding window of its own"),
        (unknown, "1", "upstream's converter doesn't support the architecture TinyNetForCausalLM"),
    ):
        result = run(SCRIPT, checkpoint, "--outfile", outfile, "--streaming-layers", layers, "--overwrite")
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith(f"error: {checkpoint}: {complaint}")
        assert "Traceback" not in result.stderr
        assert [path.name for path in destination.iterdir()] == ["a.gguf"]
        assert outfile.read_text() == "mine"
    # with nothing wrong, --overwrite replaces it
    convert(llama, outfile, layers="1", overwrite=True)
    assert read_model(outfile).spec == StreamingSpec((1,), N_LAYER)


@pytest.mark.parametrize(
    "error, line",
    [
        (ModuleNotFoundError(name="torch"), "upstream's converter needs torch: pip install 'lt-gguf[convert]'"),
        (OSError("1024 requested and 512 written"), "the disk is full, or the file is larger than allowed"),
        (ValueError("Missing\nmodel files"), "Missing model files"),
        (KeyError("lm_head"), "upstream's converter failed: KeyError: 'lm_head'; --verbose shows its log"),
    ],
)
def test_what_upstream_raises_becomes_one_line(error, line):
    assert conversion_worker._describe(error) == line


# --------------------------------------------------------------------------------------- interruptions


def start(checkpoint: Path, outfile: Path) -> tuple[subprocess.Popen[str], psutil.Process, Path]:
    """A conversion that has begun, its converter, held so that it can't finish, and its hidden folder."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(checkpoint), "--outfile", str(outfile), "--streaming-fraction", "0.5"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (workers := psutil.Process(process.pid).children()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.1)  # it is being set up: importing upstream's converter takes longer
    workers[0].suspend()
    (hidden,) = outfile.parent.glob(".converting-*")
    return process, workers[0], hidden


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_an_interrupted_conversion_leaves_nothing(llama, tmp_path, how):
    process, worker, hidden = start(llama, tmp_path / "a.gguf")
    process.send_signal(how)
    assert process.wait(timeout=60) == (130 if how == signal.SIGINT else -how)
    with contextlib.suppress(psutil.NoSuchProcess):  # on Ctrl-C it has been ended
        worker.resume()
    assert "Traceback" not in process.stderr.read()
    deadline = time.monotonic() + 30
    while hidden.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(llama, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = run(SCRIPT, llama, "--outfile", tmp_path / "a.gguf", "--streaming-fraction", "0.5", preexec_fn=limit)
    assert result.returncode == 1
    assert "the disk is full" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
