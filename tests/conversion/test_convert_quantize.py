"""Quantizing in the run of the conversion: the same file as by hand, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.tiny_checkpoint import write_checkpoint

from lt_gguf.conversion import convert, quantization
from lt_gguf.gguf.file import read_model
from lt_gguf.gguf.header import read_header
from lt_gguf.runtime.library import LIBRARY, OVERRIDE, library_dir, tool_path


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_quantized_as_by_hand(llama, tmp_path):
    options = {"layers": "1,3", "sink": 2, "window": 40}
    (tmp_path / "by-hand").mkdir()
    (unquantized,) = convert(llama, tmp_path / "by-hand" / "f16.gguf", outtype="f16", **options).files
    by_hand, imatrix = tmp_path / "by-hand" / "q.gguf", tmp_path / "by-hand" / "some.imatrix"
    text = tmp_path / "by-hand" / "text"
    text.write_text("the quick brown fox jumps over the lazy dog " * 50)
    settings = ["-c", "64", "-b", "64", "--chunks", "2", "-t", "1"]
    for command in (
        [tool_path("llama-imatrix"), "-m", unquantized, "-f", text, "-o", imatrix, *settings],
        [tool_path("llama-quantize"), "--imatrix", imatrix.name, unquantized, by_hand, "Q4_K_M"],
    ):
        subprocess.run(command, check=True, capture_output=True, cwd=imatrix.parent)
    steps: list[tuple[str, int, int]] = []
    outfile = tmp_path / "model-{ftype}.gguf"
    converted = convert(
        llama, outfile, outtype="f16", quantize="q4_k_m", imatrix=imatrix, progress=lambda *step: steps.append(step), **options
    )
    (file,) = converted.files
    assert file == tmp_path / "model-q4_k_m.gguf"
    assert file.read_bytes() == by_hand.read_bytes() != unquantized.read_bytes()
    assert read_header(file).metadata["quantize.imatrix.file"].value == "some.imatrix"  # and no path of this machine
    assert read_model(file).spec == converted.spec == read_model(unquantized).spec
    assert names(tmp_path) == ["by-hand", "model-q4_k_m.gguf"]
    n_tensors = converted.plan.files[0].n_tensors
    assert [step for step in steps if step[0] == "Quantizing"] == [("Quantizing", i + 1, n_tensors) for i in range(n_tensors)]
    size = converted.plan.n_bytes
    assert [step for step in steps if step[0] == "Converting"][-1] == ("Converting", size, size)


@pytest.mark.slow
def test_quantized_and_split_with_a_name_of_upstreams(llama, tmp_path):
    converted = convert(llama, tmp_path, layers="0", quantize="Q8_0", split_max_tensors=15)
    n = len(converted.files)
    assert n > 2
    assert names(tmp_path) == sorted(file.name for file in converted.files)
    assert converted.files[0].name.endswith(f"-Q8_0-00001-of-{n:05}.gguf")
    model = read_model(converted.files[0])
    assert (model.n_files, model.spec) == (n, converted.spec)


@pytest.mark.slow
def test_what_cannot_be_quantized(llama, tmp_path):
    imatrix = tmp_path / "some.imatrix"
    imatrix.write_text("no matrix")
    for options, error, complaint in (
        ({"quantize": "Q9"}, ValueError, r'quantize = "Q9": must be one of .*Q4_K_M.*COPY'),
        ({"quantize": "IQ2_XXS"}, ValueError, "IQ2_XXS: needs an importance matrix, add --imatrix"),
        ({"quantize": "Q8_0", "imatrix": tmp_path / "none"}, FileNotFoundError, "none"),
        ({"imatrix": imatrix}, ValueError, "--imatrix is for --quantize"),
        ({"quantize": "Q8_0", "outtype": "q8_0"}, ValueError, "outtype = q8_0: must be one of f32, f16, bf16, auto"),
        ({"quantize": "Q4_0", "imatrix": imatrix}, ValueError, "some.imatrix: is no importance matrix .llama-quantize: "),
    ):
        with pytest.raises(error, match=complaint):
            convert(llama, tmp_path / "a.gguf", layers="1", **options)
        assert names(tmp_path) == ["some.imatrix"]


def test_types_are_those_of_the_tool():
    assert {"Q4_K_M", "Q4_0", "IQ4_XS", "F16", "BF16", "TQ1_0", "MXFP4_MOE", "COPY"} <= set(quantization.types())
    assert not {"usage", "note", "example"} & {name.lower() for name in quantization.types()}


@pytest.mark.parametrize(
    "log, status, error, message",
    [
        (["x: failed to quantize: basic_ios::clear: iostream error"], 1, OSError, "the disk is full"),
        ([], 128 + 25, OSError, "the disk is full"),
        ([], 128 + 4, ValueError, "crashed while quantizing: SIGILL"),
        ([], 128 + 9, ValueError, "killed by SIGKILL while quantizing, perhaps for want of memory"),
        (["found nan value at block 3", "x: failed to quantize: quantized data validation failed"], 1, ValueError, "NaN"),
        (["main: invalid ftype"], 1, ValueError, "llama-quantize: main: invalid ftype"),
    ],
)
def test_what_the_tool_reports_becomes_one_line(log, status, error, message):
    found = quantization._error(status, log)
    assert type(found) is error and message in str(found) and "\n" not in str(found)


def test_the_tool_takes_the_cores_that_we_take(tmp_path, monkeypatch):
    tool = tmp_path / "llama-quantize"
    tool.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/arguments"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(quantization, "tool_path", lambda _: tool)
    monkeypatch.setattr(quantization, "usable_cores", lambda: 3)
    quantization.quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_0")
    assert (tmp_path / "arguments").read_text().split()[-2:] == ["Q4_0", "3"]


@pytest.mark.parametrize("argument, doing", [("--help", "showing its help"), ("--imatrix", "reading "), ("", "quantizing")])
def test_a_tool_that_crashes_is_reported_in_one_line(tmp_path, monkeypatch, argument, doing):
    tool = tmp_path / "llama-quantize"
    script = f'case "$1" in {argument}*) kill -SEGV $$;; esac; echo "allowed quantization types:"; echo "  2 or Q4_0 : small"'
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(quantization, "tool_path", lambda _: tool)
    quantization.types.cache_clear()
    imatrix = tmp_path / "some.imatrix"
    imatrix.touch()
    with pytest.raises(ValueError, match=f"^llama-quantize crashed while {doing}.*: SIGSEGV") as raised:
        if argument:
            quantization.check("Q4_0", imatrix)
        quantization.quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_0")
    assert "\n" not in str(raised.value)
    quantization.types.cache_clear()


@pytest.fixture
def slow_tool(tmp_path, monkeypatch) -> Path:
    """A llama-quantize that writes a part of its file, and no more; the folder where it says that it has."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / LIBRARY).symlink_to(library_dir() / LIBRARY)
    tool = folder / "llama-quantize"
    tool.write_text(
        f'#!/bin/sh\nif [ "$1" = --help ]; then exec "{tool_path("llama-quantize")}" --help; fi\n'
        f'echo part > "$2"; echo $$ > "{folder}/pid"; exec sleep 100\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv(OVERRIDE, str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL", pytest.param("SIGTERM", marks=pytest.mark.full)])
def test_an_interrupted_quantization_leaves_nothing(llama, tmp_path, slow_tool, how):
    out = tmp_path / "out"
    out.mkdir()
    command = [
        sys.executable,
        "-c",
        "from lt_gguf.cli import main; main()",
        "convert",
        str(llama),
        "--outfile",
        str(out / "a.gguf"),
    ]
    process = subprocess.Popen([*command, "--streaming-layers", "1", "--quantize", "Q8_0"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (slow_tool / "pid").exists() or not (slow_tool / "pid").read_text().strip():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    tool = psutil.Process(int((slow_tool / "pid").read_text()))
    assert list(out.glob(".converting-*/quantized/a.gguf"))
    process.send_signal(getattr(signal, how))
    assert "Traceback" not in process.communicate(timeout=60)[1]
    psutil.wait_procs([tool], timeout=10)
    assert not tool.is_running()
    while list(out.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not os.listdir(out)
