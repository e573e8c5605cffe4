"""The converter: upstream's tensors byte for byte, our keys beside upstream's, and nothing left of a failed conversion."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.compare_gguf import assert_same_but_for_the_streaming_keys
from support.tiny_checkpoint import N_LAYER, write_checkpoint

from lt_gguf.conversion import convert
from lt_gguf.conversion import worker as conversion_worker
from lt_gguf.conversion.nan_check import NanCheck
from lt_gguf.conversion.upstream import ConversionError, UpstreamConverter
from lt_gguf.gguf.file import read_model
from lt_gguf.report.tables import NOT_MEASURED
from lt_gguf.runtime import supervised
from lt_gguf.runtime.library import upstream_dir
from lt_gguf.spec import Provenance, StreamingSpec

SCRIPT = Path(__file__).parents[2] / "convert" / "hf_to_gguf_lt.py"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "qwen2", "qwen2", tie_word_embeddings=True)


def run(*arguments: object, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, outtype, options, spec, selection",
    [
        (
            "llama",
            "f16",
            ["--select", "interleave-odd", "--streaming-fraction", "0.5"],
            StreamingSpec((1, 3), N_LAYER),
            "interleave-odd",
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
    assert result.stderr.splitlines() == ["Reading the checkpoint", "Converting", NOT_MEASURED]
    written = run(upstream_dir() / "convert_hf_to_gguf.py", checkpoint, "--outfile", upstreams, "--outtype", outtype)
    assert written.returncode == 0, written.stderr
    assert_same_but_for_the_streaming_keys(ours, upstreams)
    model = read_model(ours)
    assert (model.spec, model.provenance) == (spec, Provenance(selection))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.gguf", "upstream.gguf"]


@pytest.mark.slow
def test_upstream_names_the_file_where_a_folder_is_given(llama, tmp_path):
    (file,) = convert(llama, tmp_path, outtype="f32", layers="none").files
    assert file.parent == tmp_path
    assert file.suffix == ".gguf" and "F32" in file.name
    assert read_model(file).spec == StreamingSpec((), N_LAYER)


@pytest.mark.slow
def test_options_of_upstreams_reach_it(llama, tmp_path):
    """The names of the files, their number and the metadata are upstream's own."""
    override = tmp_path / "override.json"
    override.write_text(json.dumps({"general.author": "Somebody"}))
    options = [
        "--split-max-tensors",
        "20",
        "--model-name",
        "A Name",
        "--metadata",
        override,
        "--no-tensor-first-split",
        "--no-lazy",
    ]
    folders = [tmp_path / "ours", tmp_path / "upstream"]
    for folder, script, more in zip(folders, (SCRIPT, upstream_dir() / "convert_hf_to_gguf.py"), (["--streaming-layers", "1"], [])):
        folder.mkdir()
        result = run(script, llama, "--outfile", folder / "x-{ftype}.gguf", "--outtype", "bf16", *options, *more)
        assert result.returncode == 0, result.stderr
    names = sorted(file.name for file in folders[0].iterdir())
    assert names == sorted(file.name for file in folders[1].iterdir())
    assert len(names) > 2 and names[0].startswith("x-bf16-00001-of-")
    for i, name in enumerate(names):
        assert_same_but_for_the_streaming_keys(folders[0] / name, folders[1] / name, n_added=0 if i else 6)
    assert read_model(folders[0] / names[0]).name == "A Name"


@pytest.mark.slow
def test_a_dry_run_writes_nothing(llama, tmp_path):
    result = run(SCRIPT, llama, "--outfile", tmp_path / "a.gguf", "--streaming-layers", "1,2", "--outtype", "f16", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith(f"{tmp_path / 'a.gguf'}: ")
    assert "2 of 4 layers stream (1-2)" in result.stdout and "nothing was written" in result.stdout
    unmeasured = convert(llama, tmp_path, dry_run=True)
    assert unmeasured.spec is None and unmeasured.files[0].parent == tmp_path
    assert not list(tmp_path.iterdir())


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
        ({"layers": "1", "fraction": 0.5}, "give either"),
        ({"layers": "3-1"}, 'layers = "3-1": must be'),
        ({"fraction": 1.5}, "fraction = 1.5: must be a number from 0 to 1"),
        ({"fraction": 0.5, "window": 0}, "window = 0: must be an integer from 1"),
        ({"layers": "1", "window": 0}, "window = 0"),
        ({"fraction": 0.5, "sink": -1}, "sink = -1"),
        ({"fraction": 0.5, "prefill": "later"}, 'prefill = "later": must be "full" or "stream"'),
        ({"fraction": 0.5, "outtype": "q3"}, 'outtype = "q3": must be one of f32, f16'),
        ({"select": "best"}, 'selection = "best": must be one of loss, lazy-ratio, frequency'),
        ({"select": "manual"}, "--streaming-layers"),
        ({"select": "lazy-ratio", "layers": "1"}, "--streaming-layers"),
        ({"select": "lazy-ratio", "threshold": 0.5}, "--threshold"),
        ({"select": "preset", "fraction": 0.5}, "must not have --streaming-fraction"),
        ({"samples": 0}, "samples = 0: must be at least 1"),
        ({"threads": -1}, "threads = -1: must be at least 0"),
        ({"w_last": 0}, "w_last = 0"),
        ({"calibration_length": 1024}, "calibration length = 1024: must be more than sink + window = 1024, else every lazy ratio"),
        ({"kv_budget": "4GiB"}, "--kv-budget needs --ctx"),
        ({"kv_budget": "much", "ctx": 1}, '--kv-budget: size = "much": must be a number of bytes'),
        ({"ctx": 1}, "--ctx is for --kv-budget, which is missing"),
        ({"kv_budget": "4GiB", "ctx": 1, "fraction": 0.5}, "must not have --streaming-fraction"),
        ({"kv_budget": "4GiB", "ctx": 1, "cache_type": "q9"}, 'cache type = "q9": must be one of f32'),
        ({"report": "x", "no_report": True}, "--report and --no-report: give one"),
        ({"split_max_tensors": 9, "use_temp_file": True}, "--use-temp-file: can't be used for a split model"),
        ({"remote": True, "select": "lazy-ratio"}, "--remote streams the weights, so no lazy ratios can be measured"),
        ({"remote": True, "layers": "1"}, "must be a hub id such as ORGANISATION/NAME, for --remote"),
        ({"mistral_format": True, "select": "lazy-ratio"}, "--mistral-format is not transformers' own"),
        ({"mistral_format": True, "layers": "1"}, "llama: has no params.json"),
        ({"calibration": Path("none.txt")}, "none.txt"),
    ],
    ids=str,
)
def test_bad_arguments(llama, tmp_path, arguments, complaint):
    with pytest.raises((ValueError, OSError)) as error:
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
    incomplete = broken(llama, tmp_path / "incomplete")
    (incomplete / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
    )
    for checkpoint, outfile, complaint in (
        (tmp_path / "none", tmp_path / "a.gguf", "none: must be the folder of a Hugging Face checkpoint"),
        (empty, tmp_path / "a.gguf", "empty: has no config.json"),
        (damaged, tmp_path / "a.gguf", r"damaged/config.json: Expecting property name"),
        (weightless, tmp_path / "a.gguf", r"weightless: has no weights, must have model\*.safetensors"),
        (incomplete, tmp_path / "a.gguf", "incomplete: model-2.safetensors of 2 files of weights are missing"),
        (llama, tmp_path / "nowhere" / "a.gguf", "the folder .*/nowhere doesn't exist"),
        (llama, existing, "existing.gguf: exists, remove it or use --overwrite"),
    ):
        with pytest.raises((ValueError, OSError), match=complaint):
            convert(checkpoint, outfile, select="interleave-odd")
    assert existing.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "empty", "existing.gguf", "incomplete", "weightless"]


@pytest.mark.slow
def test_what_is_known_only_when_upstream_has_read_the_checkpoint(llama, tmp_path):
    destination = tmp_path / "out"
    destination.mkdir()
    gemma2 = write_checkpoint(tmp_path / "gemma2", "gemma2")
    unknown = broken(llama, tmp_path / "unknown", architectures=["TinyNetForCausalLM"])
    outfile = destination / "a.gguf"
    outfile.write_text("mine")
    for checkpoint, layers, complaint in (
        (llama, "2-4", f'layers = "2-4": must be "all", "none", or layers and ranges of layers from 0 to {N_LAYER - 1}'),
        (gemma2, "0-1", "selection manual: layer 0 has no full attention, must be of those that may stream: 1,3"),
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


DAMAGED = "model.layers.2.mlp.up_proj.weight"


def damage(llama: Path, file: Path, dtype: str) -> None:
    """Writes the checkpoint's weights as `dtype`, with NaN among them."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(llama / "model.safetensors").items()}
    tensors[DAMAGED][5, 7] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.slow
def test_nan_in_the_weights(llama, tmp_path):
    damaged = broken(llama, tmp_path / "damaged")
    (damaged / "model.safetensors").unlink()
    damage(llama, damaged / "model.safetensors", "bfloat16")
    with pytest.raises(ValueError) as error:
        convert(damaged, tmp_path / "a.gguf", layers="1")
    assert f"damaged: model.safetensors: the tensor {DAMAGED} holds NaN" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_nan_is_found_in_every_type(llama, tmp_path, dtype):
    from gguf.utility import SafetensorsLocal

    file = tmp_path / "model.safetensors"
    damage(llama, file, dtype)
    tensors = SafetensorsLocal(file).tensors
    for name, tensor in tensors.items():
        check = NanCheck()
        check.add(tensor.data_range.filename, tensor.data_range.offset, tensor.data_range.size, tensor.dtype)
        if name == DAMAGED:
            with pytest.raises(ValueError, match=name):
                check.finish()
        else:
            check.finish()


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


def is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "lt_gguf.conversion.worker" in " ".join(process.cmdline())
    return False


def start(checkpoint: Path, outfile: Path) -> tuple[subprocess.Popen[str], psutil.Process, Path]:
    """A conversion that has begun, its converter, held so that it can't finish, and its hidden folder."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(checkpoint), "--outfile", str(outfile), "--streaming-layers", "1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (workers := [child for child in psutil.Process(process.pid).children() if is_worker(child)]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.1)  # it is being set up: importing upstream's converter takes longer
    workers[0].suspend()
    (hidden,) = outfile.parent.glob(".converting-*")
    return process, workers[0], hidden


def wait_until_gone(hidden: Path) -> None:
    deadline = time.monotonic() + 30
    while hidden.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_an_interrupted_conversion_leaves_nothing(llama, tmp_path, how):
    process, worker, hidden = start(llama, tmp_path / "a.gguf")
    process.send_signal(how)
    assert process.wait(timeout=60) == (130 if how == signal.SIGINT else -how)
    with contextlib.suppress(psutil.NoSuchProcess):  # on Ctrl-C it has been ended
        worker.resume()
    assert "Traceback" not in process.stderr.read()
    wait_until_gone(hidden)
    assert not list(tmp_path.iterdir())


INTERRUPTED = """
import os, sys
from lt_gguf.conversion import convert
_, model, outfile, phase, how = sys.argv
def progress(what, done, total):
    if what.startswith(phase) and done == total:
        os.kill(os.getpid(), int(how))
options = {"calibration_length": 128, "sink": 4, "window": 60, "samples": 1, "quantize": "Q8_0"}
convert(model, outfile, progress=progress, **options)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase, how",
    [
        ("Converting", signal.SIGKILL),
        *(
            pytest.param(phase, how, marks=pytest.mark.full)
            for phase in ("Reading", "Measuring", "Quantizing")
            for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        ),
    ],
    ids=str,
)
def test_interrupted_in_any_phase(llama, tmp_path, phase, how):
    out, cache = tmp_path / "out", tmp_path / "cache"
    out.mkdir()
    environment = os.environ | {"LT_GGUF_CACHE": str(cache)}
    result = run("-c", INTERRUPTED, llama, out / "a.gguf", phase, int(how), env=environment)
    # note: after Ctrl-C Python ends by its signal, or with 1 where a library has something done at the end of the process
    interrupted = how == signal.SIGINT and result.stderr.rstrip().endswith("KeyboardInterrupt")
    assert result.returncode == -how or (result.returncode == 1 and interrupted), result.stderr
    for hidden in out.glob(".converting-*"):
        wait_until_gone(hidden)
    assert not list(out.iterdir())


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(llama, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = run(SCRIPT, llama, "--outfile", tmp_path / "a.gguf", "--streaming-layers", "1", preexec_fn=limit)
    assert result.returncode == 1
    assert "the disk is full" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_without_room_is_known_before(llama, tmp_path, monkeypatch):
    free = 200_000
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": free}))
    with pytest.raises(OSError, match=r"has 195.31 KiB free, needs at least \d+\.\d+ KiB for a.gguf"):
        convert(llama, tmp_path / "a.gguf", layers="1", outtype="f16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "lines, doing",
    [
        ("", "reading the checkpoint"),
        ("sys.stdin.readline(); print(json.dumps({'written': 1, 'total': 2}), flush=True)", "writing the weights"),
    ],
)
def test_a_worker_that_crashes_is_reported_in_one_line(tmp_path, monkeypatch, lines, doing):
    script = f"import json, os, sys; sys.stdin.readline(); {lines or 'pass'}; os.kill(os.getpid(), 11)"
    monkeypatch.setattr(supervised, "python", lambda module: [sys.executable, "-c", script])
    with UpstreamConverter("a model", [], tmp_path) as converter, pytest.raises(ConversionError) as raised:
        converter.write({}, lambda done, total: None) if lines else converter.plan()
    assert str(raised.value).startswith(f"a model: the converter crashed while {doing}: SIGSEGV (invalid memory access), on ")
    assert "\n" not in str(raised.value)
